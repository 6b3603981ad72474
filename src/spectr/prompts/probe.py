"""Read a prompt for a decision: the base model runs once, without experts, and modules' inputs are scored."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.errors import CompositionError
from spectr.layers.linear_layers import input_device
from spectr.layers.pairs import LayerInput
from spectr.layers.routed_linear import RoutedLinear
from spectr.layers.token_layout import Layouts
from spectr.prompts.arguments import names_of
from spectr.prompts.chat_template import Opening
from spectr.prompts.token_places import See, read_tokens
from spectr.routers.evidence import Found, ModuleEvidence, ModuleScores


@runtime_checkable
class Scorer(Protocol):
    """Scores the experts at one module: a routed layer, or prototypes."""

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that it scores."""
        ...

    def scores(self, x: Any) -> Float[Tensor, "*T E"]:
        """Their scores for each token, float32; ``x`` is a tensor, or pairs of a routed parameter."""
        ...


_SAME = 0.1  # of the null's standard deviation: the farthest that a kept number may be off; bfloat16 moves it by 0.05
_READS_NULL = threading.RLock()  # one lock for all probes, since a probe may be copied and pickled


@dataclass(frozen=True)
class Null:
    """Texts that prompts are compared with.

    Attributes:
        batches: The model's arguments (``input_ids``, ``attention_mask``), padded on the right.
        ordinary: Whether they are ordinary prompts that the base model wrote, apart from the calibration's texts.
        numbers_QKE: What the evidence made of them when the library was calibrated, if that is known.
    """

    batches: Sequence[Mapping[str, Tensor]]
    ordinary: bool = False
    numbers_QKE: Float[Tensor, "Q K E"] | None = None

    def on(self, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """The batches on a device."""
        return ({key: tensor.to(device) for key, tensor in batch.items()} for batch in self.batches)


class Probe:
    """Runs the base model on prompts, and pools the evidence of the scores at each module.

    Args:
        entry: The module that reads prompts.
        layers: The routed layers to use, by name.
        scorers: Scores the experts at each of them; often the layer itself.
        evidence: From scores to evidence.
        experts: All experts, in alphabetical order.
        opening: What the chat template writes around a user's words. It is not counted, and of a conversation only the
            user's last turn is.
        null: Texts that the evidence compares prompts with.
        null_QKE: The evidence's numbers for these texts, if known; then the texts are not read.
    """

    def __init__(
        self,
        entry: nn.Module,
        layers: Mapping[str, RoutedLinear],
        scorers: Mapping[str, Scorer],
        evidence: ModuleEvidence,
        experts: Sequence[str],
        opening: Opening | None = None,
        null: Null | None = None,
        null_QKE: Float[Tensor, "Q K E"] | None = None,
    ):
        self.entry, self.layers, self.scorers, self.evidence = entry, dict(layers), dict(scorers), evidence
        self.experts, self.opening = tuple(experts), opening or Opening()
        self.null, self._null_QKE = null or Null(()), null_QKE
        self._layouts = Layouts(self.layers.values())

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Found:
        """The evidence for each expert.

        Args:
            args: The arguments of the model (or its encoder).
            kwargs: Its keyword arguments.
        """
        self.read_null()
        numbers_QBE = self._read(*args, **kwargs)
        null_QKE = numbers_QBE[:, :0] if self._null_QKE is None else self._null_QKE
        return self.evidence.compare(numbers_QBE, null_QKE, ordinary=self.null.ordinary)

    @torch.no_grad()
    def read_null(self) -> None:
        """Read the texts that prompts are compared with, if not done yet; otherwise the first prompt does it."""
        with _READS_NULL:
            if self._null_QKE is None and self.null.batches:
                device = input_device(self.entry)
                batches = list(self.null.on(device))
                self._null_QKE = self._kept_null(batches[0])
                if self._null_QKE is None:
                    self._null_QKE = torch.cat([self._read(**batch) for batch in batches], dim=1)

    def null_numbers(self) -> Float[Tensor, "Q K E"]:
        """What the evidence makes of the texts that prompts are compared with."""
        self.read_null()
        assert self._null_QKE is not None
        return self._null_QKE

    def _kept_null(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "Q K E"] | None:
        """What the calibration kept of the null, if this model finds the same for the first of its texts.

        With another base model, evidence or dtype the numbers may differ; then the null is read.
        """
        kept_QKE = self.null.numbers_QKE
        if kept_QKE is None:
            return None
        length = int(batch["attention_mask"][0].sum())
        found_QE = self._read(**{key: tensor[:1, :length] for key, tensor in batch.items()})[:, 0]
        if found_QE.shape != kept_QKE[:, 0].shape:
            return None
        spread_QE = (kept_QKE - kept_QKE.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
        same_QE = (found_QE - kept_QKE[:, 0]).abs() <= _SAME * spread_QE
        return kept_QKE if bool((same_QE | (found_QE.isnan() & kept_QKE[:, 0].isnan())).all()) else None

    def _read(self, *args: Any, **kwargs: Any) -> Float[Tensor, "Q B E"]:
        found: dict[str, Tensor] = {}

        def see(name: str, x_NI: LayerInput, row_N: Tensor, rows: int) -> None:
            found[name] = self.evidence.of_module(self._scores(name, x_NI, row_N, rows)).cpu()

        self.observe(see, *args, **kwargs)
        return self.evidence.of_prompt(found, {name: self.scorers[name].experts for name in found}, self.experts)

    @torch.no_grad()
    def scores(self, *args: Any, **kwargs: Any) -> dict[str, ModuleScores]:
        """The scores by module when the base model reads this input."""
        kept: dict[str, ModuleScores] = {}
        self.observe(lambda name, *given: kept.update({name: self._scores(name, *given)}), *args, **kwargs)
        return kept

    def _scores(self, name: str, x_NI: LayerInput, row_N: Tensor, rows: int) -> ModuleScores:
        scores_NE = self.scorers[name].scores(x_NI)
        return ModuleScores(scores_NE, row_N.to(scores_NE.device), rows)

    @torch.no_grad()
    def observe(self, see: See, *args: Any, **kwargs: Any) -> None:
        """Run the base model on this input.

        Args:
            see: Receives, for each used layer, its name, its input at the counted tokens of all rows, each token's
                row, and the number of rows.
            args: The arguments of the model (or its encoder).
            kwargs: Its keyword arguments.
        """
        given, counted_BT = _probe(self.entry, args, kwargs, self.evidence.probe_tokens, self.opening)
        names: dict[nn.Module, str] = {layer: name for name, layer in self.layers.items()}
        read_tokens(self.entry, self._layouts, names, see, given, counted_BT)


def numbers_among(
    scores: Mapping[str, ModuleScores],
    holders: Mapping[str, Sequence[str]],
    evidence: ModuleEvidence,
    experts: Sequence[str],
) -> Float[Tensor, "Q B E"]:
    """The numbers that some experts would have without the others; not compared with the null.

    Args:
        scores: By module, of all experts.
        holders: By module the names of its experts.
        evidence: From scores to numbers.
        experts: The experts to consider.
    """
    found: dict[str, Tensor] = {}
    names: dict[str, Sequence[str]] = {}
    for module, rows in scores.items():
        places = [place for place, other in enumerate(holders[module]) if other in experts]
        if places:
            names[module] = [holders[module][place] for place in places]
            found[module] = evidence.of_module(rows._replace(scores_NE=rows.scores_NE[:, places])).cpu()
    return evidence.of_prompt(found, names, experts)


def _probe(
    entry: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int, opening: Opening
) -> tuple[dict[str, Any], Tensor | None]:
    """What the base model reads for a decision, and which of these tokens are counted, (batch, tokens).

    For token ids: the first ``limit`` tokens of the user's last turn, padded on the right. For embeddings: the first
    ``limit``. Any other input is read completely.

    Raises:
        CompositionError: There is no token.
    """
    parameters = names_of(entry.forward, getattr(entry, "config", None))
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    key = next((key for key in ("input_ids", "inputs_embeds") if given.get(key) is not None), None)
    if key is None:
        return given, None
    tokens, mask = given[key], given.get("attention_mask")
    real_BT = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real_BT = mask.to(tokens.device).bool()
    if not bool(real_BT.any()):
        raise CompositionError(
            f"the prompts ({key} of shape {tuple(real_BT.shape)}) have no token that the attention mask leaves",
            expected="at least one token to decide by",
            do="leave empty prompts out, or decide yourself: with routed.prompt.using(decision): ...",
        )
    rows = [row[real_T] for row, real_T in zip(tokens, real_BT, strict=True)]
    skipped: Sequence[int] = [0] * len(rows)
    if key == "input_ids":
        turns, skipped = zip(*(opening.counted(row.tolist(), limit) for row in rows), strict=True)
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
