"""Asking a composed model's layers about a prompt: the base model reads it once, alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.errors import CompositionError
from spectr.layers.batch_routing import BatchRouting, routed_by
from spectr.layers.routed import RoutedLinear
from spectr.prompts.chat_template import Opening
from spectr.routers.base import ProbingRouter


@runtime_checkable
class Voter(Protocol):
    """What scores the experts at one module."""

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of those that it scores."""
        ...

    def scores(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T E"]:
        """Their scores for each token, float32."""
        ...


See = Callable[[str, Float[Tensor, "N I"], Tensor, int], None]


class Heard(NamedTuple):
    """What one module's voters score on a batch: of all its tokens that have a say, and whose they are.

    Attributes:
        scores_NE: Float32.
        row_N: Row of the batch.
        rows: How many there are.
    """

    scores_NE: Float[Tensor, "N E"]
    row_N: Tensor
    rows: int

    def evidence(self, router: ProbingRouter) -> Float[Tensor, "B E"]:
        """Each row's mean over its tokens, a token counting by its certainty."""
        evidence_NE = router.evidence(self.scores_NE)
        weight_N = router.certainty(evidence_NE)
        total_BE = evidence_NE.new_zeros(self.rows, evidence_NE.shape[-1])
        total_BE.index_add_(0, self.row_N, evidence_NE * weight_N[:, None])
        weight_B = weight_N.new_zeros(self.rows).index_add_(0, self.row_N, weight_N)
        return (total_BE / weight_B[:, None].clamp(min=1e-30)).cpu()


class Probe:
    """Pools what the scores say of a prompt: each expert's mean evidence over tokens and modules.

    Args:
        entry: The module that reads prompts.
        layers: Those of its routed layers that are listened to, by name.
        voters: What scores the experts at each of them; often the layer itself.
        router: Turns scores into evidence.
        experts: All experts, in alphabetical order.
        opening: What the chat template writes around a user's words. It has no say, and of a conversation the user's
            last turn alone decides.
        usual: Texts (``input_ids``, ``attention_mask``) whose evidence counts as nothing: the calibration's.
        usual_E: These texts' evidence, where it is known; then they are not read.
    """

    def __init__(
        self,
        entry: nn.Module,
        layers: Mapping[str, RoutedLinear],
        voters: Mapping[str, Voter],
        router: ProbingRouter,
        experts: Sequence[str],
        opening: Opening | None = None,
        usual: Mapping[str, Tensor] | None = None,
        usual_E: Float[Tensor, " E"] | None = None,
    ):
        self.entry, self.layers, self.voters, self.router = entry, dict(layers), dict(voters), router
        self.experts, self.opening = tuple(experts), opening or Opening()
        self.usual, self._usual_E = usual, usual_E

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """What speaks for each expert, less its mean over the usual texts, plus one: 1 says nothing.

        Args:
            args: As the model (or its encoder) is called.
            kwargs: Likewise.
        """
        self.learn_usual()
        evidence_BE = self._read(*args, **kwargs)
        return evidence_BE if self._usual_E is None else evidence_BE - self._usual_E + 1

    @torch.no_grad()
    def learn_usual(self) -> None:
        """Read the usual texts, unless that is done: else it is with the first prompt."""
        if self._usual_E is None and self.usual is not None:
            device = next(self.entry.parameters()).device
            self._usual_E = self._read(**{key: t.to(device) for key, t in self.usual.items()}).mean(0)

    def _read(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        evidence: dict[str, Tensor] = {}

        def see(name: str, x_NI: Tensor, row_N: Tensor, rows: int) -> None:
            evidence[name] = self._heard(name, x_NI, row_N, rows).evidence(self.router)

        self.listen(see, *args, **kwargs)
        return pooled(evidence, {name: self.voters[name].experts for name in evidence}, self.experts)

    @torch.no_grad()
    def hear(self, *args: Any, **kwargs: Any) -> dict[str, Heard]:
        """What the voters score, by module, when the base model reads this."""
        kept: dict[str, Heard] = {}
        self.listen(lambda name, *given: kept.update({name: self._heard(name, *given)}), *args, **kwargs)
        return kept

    def _heard(self, name: str, x_NI: Float[Tensor, "N I"], row_N: Tensor, rows: int) -> Heard:
        scores_NE = self.voters[name].scores(x_NI)
        return Heard(scores_NE, row_N.to(scores_NE.device), rows)

    @torch.no_grad()
    def listen(self, see: See, *args: Any, **kwargs: Any) -> None:
        """Have the base model read this.

        Args:
            see: Is given, for each layer that is listened to, its name, its input at the tokens of all rows that have a
                say, whose these are, and how many rows there are.
            args: As the model (or its encoder) is called.
            kwargs: Likewise.
        """
        given, counted_BT = _probe(self.entry, args, kwargs, self.router.probe_tokens, self.opening)
        read = {layer: _listener(see, name, counted_BT) for name, layer in self.layers.items()}

        def observe(layer: RoutedLinear, x: Tensor) -> None:
            if layer in read:
                read[layer](x)

        with routed_by(BatchRouting(base_only=True, observe=observe)):
            self.entry.forward(**given)  # not the call: whoever watches the model's calls is not to see this one

    def evidence_of(self, heard: Mapping[str, Heard], experts: Sequence[str]) -> Float[Tensor, "B E"]:
        """See :func:`evidence_of`."""
        return evidence_of(heard, {name: self.voters[name].experts for name in heard}, self.router, experts)


def evidence_of(
    heard: Mapping[str, Heard], voters: Mapping[str, Sequence[str]], router: ProbingRouter, experts: Sequence[str]
) -> Float[Tensor, "B E"]:
    """As if what was heard had been heard by some of the experts alone; nothing is taken off it.

    Args:
        heard: By module.
        voters: By module the names of those that it was heard by.
        router: Turns scores into evidence.
        experts: Those that count.
    """
    some: dict[str, Tensor] = {}
    names: dict[str, Sequence[str]] = {}
    for module, rows in heard.items():
        places = [place for place, other in enumerate(voters[module]) if other in experts]
        if places:
            names[module] = [voters[module][place] for place in places]
            some[module] = rows._replace(scores_NE=rows.scores_NE[:, places]).evidence(router)
    return pooled(some, names, experts)


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
    skipped: Sequence[int] = [0] * len(rows)
    if key == "input_ids":
        turns, skipped = zip(*(opening.heard(row.tolist(), limit) for row in rows), strict=True)
        rows = [torch.tensor(turn, device=tokens.device, dtype=tokens.dtype) for turn in turns]
    else:
        rows = [row[:limit] for row in rows]
    place_T = torch.arange(max(map(len, rows)), device=tokens.device)
    length_B1 = torch.tensor([len(row) for row in rows], device=tokens.device)[:, None]
    mask_BT = place_T < length_B1
    counted_BT = mask_BT & (place_T >= torch.tensor(skipped, device=tokens.device)[:, None])
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    probe: dict[str, Any] = {key: padded, "attention_mask": mask_BT.long()}
    probe |= {"use_cache": False} if "use_cache" in parameters else {}
    probe |= {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    return probe, counted_BT


def _listener(see: See, name: str, counted_BT: Tensor | None) -> Callable[[Tensor], None]:
    def listen(x: Tensor) -> None:
        if x.ndim < 3:  # tokens of all rows in one axis: nobody can tell whose they are
            return
        x_BTI = x.flatten(1, -2)
        counted = torch.ones(x_BTI.shape[:2], dtype=torch.bool) if counted_BT is None else counted_BT
        if counted.shape != x_BTI.shape[:2]:
            return
        counted = counted.to(x.device)
        see(name, x_BTI[counted], counted.nonzero()[:, 0], len(counted))  # N: the tokens of all rows that have a say

    return listen


def pooled(
    gathered: Mapping[str, Tensor], voters: Mapping[str, Sequence[str]], experts: Sequence[str]
) -> Float[Tensor, "B E"]:
    """Each expert's mean evidence over the modules that it adapts."""
    if not gathered:
        raise CompositionError(
            "no layer could say anything about this prompt", do="use level='token', or name the experts yourself"
        )
    first = next(iter(gathered.values()))
    total_BE, count_E = first.new_zeros(len(first), len(experts)), torch.zeros(len(experts))
    places = {expert: place for place, expert in enumerate(experts)}
    for name, evidence_BE in gathered.items():
        chosen = [places[expert] for expert in voters[name]]
        total_BE[:, chosen] += evidence_BE
        count_E[chosen] += 1
    return total_BE / count_E.clamp(min=1)
