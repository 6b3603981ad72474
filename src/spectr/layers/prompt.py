"""Decisions for whole prompts: the base model reads a prompt once, its layers are asked, and the answer is held."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.errors import CompositionError
from spectr.layers.routed import RoutedLinear
from spectr.routers.base import PromptRouter


class Opening(NamedTuple):
    """What a chat template writes around a user's words, as token ids; both are empty without a template.

    Attributes:
        first: Before the first user turn, the system turn included; it has no say.
        later: Between an assistant's answer and the next user turn.
        last: After the last user turn, where the answer begins; it has no say either.
    """

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    last: tuple[int, ...] = ()

    def last_turn(self, ids: list[int]) -> list[int]:
        """A conversation less all turns before the user's last; anything else as it is."""
        size = len(self.later)
        last = len(ids) - size - 1  # something has to follow
        begins = (i for i in range(last, -1, -1) if size and tuple(ids[i : i + size]) == self.later)
        begin = next(begins, None)
        return ids if begin is None else [*self.first, *ids[begin + size :]]

    def length(self, ids: list[int]) -> int:
        """How many tokens at the beginning have no say."""
        size = len(self.first)
        return size if len(ids) > size and tuple(ids[:size]) == self.first else 0

    def closing(self, ids: list[int]) -> int:
        """How many tokens at the end have no say; something is left in between."""
        size = len(self.last)
        ends = bool(size) and len(ids) > self.length(ids) + size and tuple(ids[-size:]) == self.last
        return size if ends else 0


class PromptDecision:
    """Pools what a composed model's layers say about a prompt, decides, and has the layers hold the decision.

    Watches the calls of the model (of its encoder, where it has one): a call without a filled cache begins a prompt
    and is decided anew, a call that goes on with a cache keeps the decision.

    Args:
        model: The composed model.
        layers: Its routed layers by name.
        router: Turns scores into evidence, and evidence into weights.
        experts: All experts, in alphabetical order.
        opening: What the chat template writes around a user's words. It has no say, and of a conversation the user's
            last turn alone decides.
        usual: Texts (``input_ids``, ``attention_mask``) whose evidence counts as nothing: the calibration's.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, RoutedLinear],
        router: PromptRouter,
        experts: Sequence[str],
        opening: Opening | None = None,
        usual: Mapping[str, Tensor] | None = None,
    ):
        self.entry, self.layers, self.router = _entry(model), dict(layers), router
        self.experts, self.opening = tuple(experts), opening or Opening()
        self.weights_BE: Tensor | None = None
        self._usual, self._usual_E = usual, None
        self._pinned = False
        self._handle = self.entry.register_forward_pre_hook(self._on_call, with_kwargs=True)

    def decide(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """Read a prompt with the base model alone and return what is to be held of it, without holding it.

        The experts' weights; or, of a router that decides for each token with the prompt as prior, the prior.

        Args:
            args: As the model (or its encoder) is called.
            kwargs: Likewise.
        """
        return self.router.verdict(self.evidence(*args, **kwargs))

    @torch.no_grad()
    def evidence(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """What speaks for each expert: its mean evidence over the prompt's tokens and the modules that it adapts.

        Less its mean over the usual texts, plus one: 1 says nothing.
        """
        if self._usual_E is None and self._usual is not None:
            device = next(self.entry.parameters()).device
            self._usual_E = self._read(**{key: t.to(device) for key, t in self._usual.items()}).mean(0)
        evidence_BE = self._read(*args, **kwargs)
        return evidence_BE if self._usual_E is None else evidence_BE - self._usual_E + 1

    def _read(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        given, counted_BT = _probe(self.entry, args, kwargs, self.router.probe_tokens, self.opening)
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
        """Have all layers hold these weights, or this prior; pinned, until ``hold(None)``."""
        for layer in self.layers.values():
            take = layer.hold if self.router.level == "prompt" else layer.inform
            chosen = [self.experts.index(name) for name in layer.experts]
            take(None if weights_BE is None else weights_BE[:, chosen])
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
            given = next(
                (t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None
            )
            if isinstance(given, Tensor) and len(given) != len(self.weights_BE):
                raise CompositionError(
                    f"the cache goes on with {len(given)} rows, and {len(self.weights_BE)} were decided on",
                    do="decide on all rows and hold that: prompt.hold(prompt.decide(...))",
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


def decides_by_prompt(model: nn.Module) -> bool:
    """Whether a model is composed with a router that reads a prompt before it answers."""
    routers = (module.router for module in model.modules() if isinstance(module, RoutedLinear))
    router = next(routers, None)
    return isinstance(router, PromptRouter) and router.level != "token"


def _entry(model: nn.Module) -> nn.Module:
    """The module that reads prompts."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()  # pyright: ignore[reportCallIssue]
    return model


def _goes_on(kwargs: Mapping[str, Any]) -> bool:
    cache = kwargs.get("past_key_values")
    return cache is not None and int(cache.get_seq_length()) > 0


def _probe(
    entry: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int, opening: Opening
) -> tuple[dict[str, Any], Tensor | None]:
    """What the base model is to read for a decision, and which of these tokens have a say, (batch, tokens).

    Of token ids the user's last turn, its first ``limit`` tokens, padded on the right; of embeddings the first
    ``limit`` alone. Anything else is read whole, as it is.
    """
    parameters = inspect.signature(entry.forward).parameters
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    key = next((key for key in ("input_ids", "inputs_embeds") if given.get(key) is not None), None)
    if key is None:
        return given, None
    tokens, mask = given[key], given.get("attention_mask")
    real_BT = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real_BT = mask.to(tokens.device).bool()
    rows = [row[real_T] for row, real_T in zip(tokens, real_BT, strict=True)]
    skipped, closing = [0] * len(rows), [0] * len(rows)
    if key == "input_ids":
        turns = [opening.last_turn(row.tolist()) for row in rows]
        skipped = [opening.length(turn) for turn in turns]
        closing = [opening.closing(turn) for turn in turns]
        rows = [torch.tensor(turn, device=tokens.device, dtype=tokens.dtype) for turn in turns]
    ends = [len(row) - size for row, size in zip(rows, closing, strict=True)]
    rows = [row[: min(skip + limit, end)] for row, skip, end in zip(rows, skipped, ends, strict=True)]
    place_T = torch.arange(max(map(len, rows)), device=tokens.device)
    length_B1 = torch.tensor([len(row) for row in rows], device=tokens.device)[:, None]
    mask_BT = place_T < length_B1
    counted_BT = mask_BT & (place_T >= torch.tensor(skipped, device=tokens.device)[:, None])
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    probe: dict[str, Any] = {key: padded, "attention_mask": mask_BT.long()}
    probe |= {"use_cache": False} if "use_cache" in parameters else {}
    probe |= {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    return probe, counted_BT


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
        weight_BT = counted.to(evidence_BTE) * router.certainty(evidence_BTE)
        share_BT = weight_BT / weight_BT.sum(1, keepdim=True).clamp(min=1e-30)
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
