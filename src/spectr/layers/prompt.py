"""Decisions for whole prompts: the base model reads a prompt once, its layers are asked, and the answer is held."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spectr.errors import CompositionError
from spectr.layers.routed import RoutedLinear
from spectr.routers.base import PromptRouter


class PromptDecision:
    """Pools what a composed model's layers say about a prompt, decides, and has the layers hold the decision.

    Watches the calls of the model (of its encoder, where it has one): a call without a filled cache begins a prompt
    and is decided anew, a call that goes on with a cache keeps the decision.

    Args:
        model: The composed model.
        layers: Its routed layers by name.
        router: Turns scores into evidence, and evidence into weights.
        experts: All experts, in alphabetical order.
        opening: Token ids that every prompt begins with (a chat template's); they have no say.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, RoutedLinear],
        router: PromptRouter,
        experts: Sequence[str],
        opening: Sequence[int] = (),
    ):
        self.entry, self.layers, self.router = _entry(model), dict(layers), router
        self.experts, self.opening = tuple(experts), tuple(opening)
        self.weights_BE: Tensor | None = None
        self._pinned = False
        self._handle = self.entry.register_forward_pre_hook(self._on_call, with_kwargs=True)

    def decide(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """Read a prompt with the base model alone and return the experts' weights, without holding them.

        Args:
            args: As the model (or its encoder) is called.
            kwargs: Likewise.
        """
        return self.router.selection(self.evidence(*args, **kwargs))

    @torch.no_grad()
    def evidence(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """What speaks for each expert: its mean evidence over the prompt's tokens and the modules that it adapts."""
        given, mask_BT = _bounded(self.entry, args, kwargs, self.router.probe_tokens)
        counted_BT = None if mask_BT is None else _without_opening(given.get("input_ids"), mask_BT, self.opening)
        gathered: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.listen = _listener(gathered, name, self.router, counted_BT)
        try:
            self.entry.forward(**given)  # not the call: whoever watches the model's calls is not to see this one
        finally:
            for layer in self.layers.values():
                layer.listen = None
        return _pooled(gathered, self.layers, self.experts)

    def hold(self, weights_BE: Float[Tensor, "B E"] | None, *, pin: bool = True) -> None:
        """Have all layers hold these weights; pinned, until ``hold(None)`` and whatever is read meanwhile."""
        for layer in self.layers.values():
            chosen = [self.experts.index(name) for name in layer.experts]
            layer.hold(None if weights_BE is None else weights_BE[:, chosen])
        self.weights_BE, self._pinned = weights_BE, pin and weights_BE is not None

    def close(self) -> None:
        """Stop watching the model."""
        self._handle.remove()

    def _on_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pinned:
            return
        if _goes_on(kwargs):
            if self.weights_BE is None:
                raise CompositionError(
                    "the cache was filled before the model was composed", do="read the prompt again, without that cache"
                )
            return
        self.hold(self.decide(*args, **kwargs), pin=False)


@contextmanager
def pinned(decision: PromptDecision, weights_BE: Float[Tensor, "B E"]) -> Iterator[None]:
    """Hold a decision while the block runs."""
    decision.hold(weights_BE)
    try:
        yield
    finally:
        decision.hold(None)


def _entry(model: nn.Module) -> nn.Module:
    """The module that reads prompts."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()  # pyright: ignore[reportCallIssue]
    return model


def _goes_on(kwargs: Mapping[str, Any]) -> bool:
    cache = kwargs.get("past_key_values")
    return cache is not None and int(cache.get_seq_length()) > 0


def _bounded(
    entry: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int
) -> tuple[dict[str, Any], Tensor | None]:
    """The call's arguments with the first ``limit`` real tokens of each row alone, and which of these are real."""
    parameters = inspect.signature(entry.forward).parameters
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    key = next((key for key in ("input_ids", "inputs_embeds") if given.get(key) is not None), None)
    if key is None:  # no text: all of it, as it is
        return given, None
    tokens = given[key]
    mask = given.get("attention_mask")
    real_BT = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real_BT = mask.to(tokens.device).bool()
    kept_BT = real_BT & (real_BT.cumsum(1) <= limit)
    order_BT = (~kept_BT).int().argsort(dim=1, stable=True)[:, : int(kept_BT.sum(1).max())]
    rows_B1 = torch.arange(len(tokens), device=tokens.device)[:, None]
    mask_BT = kept_BT[rows_B1, order_BT]
    probe: dict[str, Any] = {key: tokens[rows_B1, order_BT], "attention_mask": mask_BT.long()}
    probe |= {"use_cache": False} if "use_cache" in parameters else {}
    probe |= {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    return probe, mask_BT


def _without_opening(
    input_ids: Tensor | None, mask_BT: Bool[Tensor, "B T"], opening: Sequence[int]
) -> Bool[Tensor, "B T"]:
    """The real tokens less the opening, in rows that begin with it and have more than that."""
    size = len(opening)
    if input_ids is None or not size or input_ids.shape[1] <= size:
        return mask_BT
    expected = torch.tensor(opening, device=input_ids.device)
    begins_B = (input_ids[:, :size] == expected).all(1) & (mask_BT.sum(1) > size)
    counted_BT = mask_BT.clone()
    counted_BT[:, :size] &= ~begins_B[:, None]
    return counted_BT


def _listener(
    gathered: dict[str, Tensor], name: str, router: PromptRouter, counted_BT: Tensor | None
) -> Callable[[Tensor], None]:
    def listen(scores_TE: Tensor) -> None:
        if scores_TE.ndim < 3:  # tokens of all rows in one axis: nobody can tell whose they are
            return
        evidence_BTE = router.evidence(scores_TE.flatten(1, -2))
        counted = torch.ones(evidence_BTE.shape[:2], dtype=torch.bool) if counted_BT is None else counted_BT
        if counted.shape != evidence_BTE.shape[:2]:
            return
        share_BT = counted.to(evidence_BTE) / counted.sum(1, keepdim=True).clamp(min=1).to(evidence_BTE)
        gathered[name] = torch.einsum("bte,bt->be", evidence_BTE, share_BT).cpu()

    return listen


def _pooled(
    gathered: Mapping[str, Tensor], layers: Mapping[str, RoutedLinear], experts: Sequence[str]
) -> Float[Tensor, "B E"]:
    """Each expert's mean evidence over the modules that it adapts."""
    if not gathered:
        raise CompositionError(
            "no layer could say anything about this prompt", do="use level='token', or name the experts yourself"
        )
    rows = len(next(iter(gathered.values())))
    total_BE, count_E = torch.zeros(rows, len(experts)), torch.zeros(len(experts))
    for name, evidence_BE in gathered.items():
        chosen = [experts.index(expert) for expert in layers[name].experts]
        total_BE[:, chosen] += evidence_BE
        count_E[chosen] += 1
    return total_BE / count_E.clamp(min=1)
