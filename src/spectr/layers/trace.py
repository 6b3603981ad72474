"""Record what each layer of a routed model chooses for each token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spectr.errors import CompositionError, did_you_mean
from spectr.layers.batch_routing import base_alone, thread
from spectr.layers.pairs import Pairs
from spectr.layers.routed_linear import RoutedLinear


@dataclass(kw_only=True, eq=False, repr=False)
class LayerTrace:
    """One layer's decisions in all calls, in order.

    Attributes:
        experts: The layer's experts, in the order of the last axis; all that it held, if they change.
        steps: For each call (scores, weights), float32 on the CPU, each (batch, tokens, experts). An expert that the
            layer did not hold has the score minus infinity.
    """

    experts: tuple[str, ...]
    steps: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, experts: tuple[str, ...], scores: Float[Tensor, "B T E"], weights: Float[Tensor, "B T E"]) -> None:
        """Add a call, with the experts that the layer held."""
        if experts != self.experts:
            known = tuple(sorted({*self.experts, *experts}))
            self.steps = [
                (_spread(s, self.experts, known, -torch.inf), _spread(w, self.experts, known, 0.0))
                for s, w in self.steps
            ]
            scores, weights = _spread(scores, experts, known, -torch.inf), _spread(weights, experts, known, 0.0)
            self.experts = known
        self.steps.append((scores, weights))

    @property
    def scores(self) -> Float[Tensor, "B T E"]:
        """Scores of all calls, joined along the tokens."""
        return torch.cat([scores for scores, _ in self.steps], dim=1)

    @property
    def weights(self) -> Float[Tensor, "B T E"]:
        """Weights of all calls, joined along the tokens; zero where an expert was not chosen."""
        return torch.cat([weights for _, weights in self.steps], dim=1)

    def __repr__(self) -> str:
        return f"LayerTrace({len(self.experts)} experts, {len(self.steps)} calls)"

    def chosen(self, batch: int, token: int) -> tuple[str, ...]:
        """The experts that one token uses, the largest weight first."""
        weights_E = self.weights[batch, token]
        return tuple(self.experts[i] for i in weights_E.argsort(descending=True, stable=True) if weights_E[i] > 0)


@dataclass(kw_only=True, eq=False, repr=False)
class Trace(Mapping[str, LayerTrace]):
    """The choices of a model's layers while the trace was open: a mapping from layer names to :class:`LayerTrace`.

    Attributes:
        inputs: The ``input_ids`` of each call of the model, (batch, tokens), if it received some.
        masks: For each call (with ``input_ids`` or ``inputs_embeds``), the tokens that are not padding, (batch,
            tokens).
    """

    layers: dict[str, LayerTrace] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)

    @property
    def experts(self) -> tuple[str, ...]:
        """All experts that the layers held, in alphabetical order."""
        return tuple(sorted({name for layer in self.layers.values() for name in layer.experts}))

    @property
    def input_ids(self) -> Int[Tensor, "B T"]:
        """Token ids of all calls, joined along the tokens."""
        return torch.cat(self.inputs, dim=1)

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        """Which of :attr:`input_ids` are no padding."""
        return torch.cat(self.masks, dim=1)

    def weights(self, layers: Callable[[str], bool] = lambda _: True) -> Float[Tensor, "B T E"]:
        """Mean weight of every expert in :attr:`experts` over the layers whose name passes, for each token.

        A layer that does not hold an expert counts with weight zero. Layers that ran over other tokens than most
        layers (an encoder next to a decoder) are left out.

        Raises:
            CompositionError: No layer's name passes, or nothing was traced.
        """
        found = [layer for name, layer in self.layers.items() if layers(name) and layer.steps]
        if not found:
            raise CompositionError(
                "no routed layer was traced",
                do="run the model inside the with-block; a compiled model must run uncompiled",
            )
        experts = self.experts
        shapes = [layer.weights.shape[:2] for layer in found]
        [(commonest, _)] = Counter(shapes).most_common(1)
        total = torch.zeros(*commonest, len(experts), dtype=torch.float32)
        for layer, shape in zip(found, shapes, strict=True):
            if shape == commonest:
                total[..., [experts.index(name) for name in layer.experts]] += layer.weights
        return total / shapes.count(commonest)

    def mean_scores(self) -> Float[Tensor, "B T E"]:
        """Mean score of every expert of :attr:`experts` over the layers that hold all of them, for each token.

        Raises:
            CompositionError: No layer holds all experts, or layers ran over different tokens.
        """
        whole = [layer.scores for layer in self.layers.values() if layer.experts == self.experts and layer.steps]
        if not whole or len({scores.shape for scores in whole}) > 1:
            raise CompositionError("no layers hold all experts for the same tokens", do="read the layers' own scores")
        return torch.stack(whole).mean(0)

    def shares(self) -> dict[str, float]:
        """Each expert's share of the weight, averaged over all layers and tokens without padding; from 0 to 1."""
        weights = self.weights()
        if self.masks and self.mask.shape == weights.shape[:2]:
            mean_E = weights[self.mask].mean(0)
        else:
            mean_E = weights.flatten(0, 1).mean(0)
        return dict(zip(self.experts, mean_E.tolist(), strict=True))

    def __repr__(self) -> str:
        steps = max((len(layer.steps) for layer in self.layers.values()), default=0)
        return f"Trace({len(self)} layers, {len(self.experts)} experts, {steps} calls)"

    def __getitem__(self, layer: str) -> LayerTrace:
        if layer not in self.layers:
            raise CompositionError(f"there is no trace of a layer '{layer}'", do=did_you_mean(layer, self.layers))
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Record what the routed layers of a model choose while the block runs; its results do not change.

    Hooks route each layer's input a second time. Without a trace nothing is recorded, at no cost.

    Raises:
        CompositionError: The model has no routed layers.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled model: the module itself
    routed = {name: module for name, module in model.named_modules() if isinstance(module, RoutedLinear)}
    if not routed:
        raise CompositionError("this model has no routed layers", do="compose it first: spectr.compose(model, library)")
    record = Trace()
    handles = [model.register_forward_pre_hook(_watch_input(record), with_kwargs=True)]
    for name, layer in routed.items():
        record.layers[name] = LayerTrace(experts=layer.experts)
        handles.append(layer.register_forward_pre_hook(_watch_layer(record.layers[name]), with_kwargs=True))
    thread.watched += 1
    try:
        yield record
    finally:
        thread.watched -= 1
        for handle in handles:
            handle.remove()


def _watch_layer(record: LayerTrace) -> Callable[[nn.Module, Any, Any], None]:
    @torch.no_grad()
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, RoutedLinear)
        if base_alone():  # it reads a prompt before the answer
            return
        given = args[0] if args else kwargs["input"]
        x = given.tokens_NH if isinstance(given, Pairs) else given
        call = layer.in_force()
        if call.shown is None:  # none of a prompt's shortlist adapts it
            nothing = _three_axes(x.new_zeros(*x.shape[:-1], 0), layer, x)
            record.add((), nothing, nothing)
            return
        decision = layer.explain(given, call)
        scores_BTE = _three_axes(decision.scores_TE, layer, x, missing=-torch.inf)
        record.add(call.shown.experts, scores_BTE, _three_axes(decision.weights_TE, layer, x))

    return hook


def _watch_input(record: Trace) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if base_alone():  # the base model writes an instruction
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if ids is None else ids
        if not isinstance(given, Tensor) or given.ndim != (3 if given.is_floating_point() else 2):
            return
        mask = kwargs.get("attention_mask")
        real = torch.ones(given.shape[:2], dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -given.shape[1] :].bool()
        record.masks.append(real.detach().cpu())
        if not given.is_floating_point():
            record.inputs.append(given.detach().cpu())

    return hook


def _spread(
    values_BTE: Float[Tensor, "B T E"], experts: tuple[str, ...], known: tuple[str, ...], missing: float
) -> Float[Tensor, "B T F"]:
    spread_BTF = torch.full((*values_BTE.shape[:2], len(known)), missing, dtype=torch.float32)
    spread_BTF[..., [known.index(name) for name in experts]] = values_BTE
    return spread_BTF


def _three_axes(
    tensor: Float[Tensor, "*L E"], layer: RoutedLinear, x: Tensor, missing: float = 0.0
) -> Float[Tensor, "B T E"]:
    """By rows and tokens, where these are known; otherwise as the layer is given them."""
    tensor, places = tensor.detach().float().cpu(), thread.places
    found = None if places is None else places.by_rows(tensor, layer, x, missing)
    if found is not None:
        return found
    return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.flatten(1, -2)
