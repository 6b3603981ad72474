"""What reads prompts of a composed model for a set of its experts, as it would if it held no others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spectr.layers.linear_layers import input_device
from spectr.library import Calibration, ExpertLibrary
from spectr.prompts.bounds import BoundedScorer
from spectr.prompts.chat_template import Opening
from spectr.prompts.decision import entry_of
from spectr.prompts.probe import Null, Probe, Scorer, numbers_among
from spectr.routers.evidence import Guide, ModuleEvidence, ModuleScores, Reader

if TYPE_CHECKING:
    from spectr.composition.routed import Routed

_KEPT = 64  # sets whose reader is kept
_BUDGET = 1 << 28  # bytes of the null's scores that are kept for sets; beyond, a set's first use reads it again
_TOGETHER = 32  # texts of the null that are read at once


class Readers:
    """A composed model's readers by set of experts; those that were used last are kept.

    Args:
        routed: The composed model, with a policy for prompts, whose evidence reads through this object
            (:class:`spectr.routers.evidence.Source`). The model has to be the base model for this thread then.
    """

    def __init__(self, routed: Routed):
        assert routed.policy is not None
        self._routed, self._evidence = routed, routed.policy.evidence
        self._readers = OrderedDict[tuple[str, ...], Reader]()
        self._null: list[dict[str, ModuleScores]] | None = None

    @property
    def library(self) -> ExpertLibrary:
        """See :class:`spectr.routers.evidence.Source`."""
        return self._routed.library

    @property
    def guide(self) -> Guide | None:
        """See :class:`spectr.routers.evidence.Source`."""
        return self._routed.guide

    def of(self, names: tuple[str, ...]) -> Reader:
        """What reads for these experts."""
        if names not in self._readers:
            self._readers[names] = self._evidence.reader(self, names)
            while len(self._readers) > _KEPT:
                self._readers.popitem(last=False)
        self._readers.move_to_end(names)
        return self._readers[names]

    def module_reader(self, evidence: ModuleEvidence, experts: tuple[str, ...]) -> Reader:
        """See :class:`spectr.routers.evidence.Source`."""
        routed = self._routed
        layers, scorers = routed.layers, routed.scorers
        if experts != routed.experts:
            scorers = {module: _Some(scorer, experts) for module, scorer in scorers.items()}
        known = routed.library.calibration
        layers = {name: layer for name, layer in layers.items() if known is None or name not in known.unmeasured}
        read = [module for module in layers if module in scorers and scorers[module].experts][:: evidence.module_stride]
        opening, null = calibration_texts(known)
        if known is not None and known.null_experts == experts and evidence.reads == "scores":
            null = replace(null, numbers_QKE=known.null_numbers)
        probe = Probe(
            entry_of(routed.model),
            {module: layers[module] for module in read},
            {module: scorers[module] for module in read},
            evidence,
            experts,
            opening,
            null,
            self._null_among(evidence, opening, null, experts),
        )
        return routed.reader(probe)

    def _null_among(
        self, evidence: ModuleEvidence, opening: Opening, null: Null, names: tuple[str, ...]
    ) -> Tensor | None:
        """What the evidence makes of the null for some experts, from scores that are read once for all sets.

        ``None`` leaves it to the probe to read the null: of all experts, or where scores are too many to be kept.
        """
        routed = self._routed
        if evidence.reads != "scores" or names == routed.experts or self._size(null) > _BUDGET:
            return None
        if self._null is None:
            device = input_device(routed.model)
            unmeasured = () if routed.library.calibration is None else routed.library.calibration.unmeasured
            layers = {name: layer for name, layer in routed.layers.items() if name not in unmeasured}
            probe = Probe(entry_of(routed.model), layers, routed.scorers, evidence, routed.experts, opening)
            self._null = [probe.scores(**batch) for batch in null.on(device)]
        parts = [
            numbers_among(scores, {module: routed.scorers[module].experts for module in scores}, evidence, names)
            for scores in self._null
        ]
        return torch.cat(parts, dim=1)

    def _size(self, null: Null) -> int:
        """Bytes that all scores of the null take."""
        tokens = sum(int(batch["attention_mask"].sum()) for batch in null.batches)
        return 4 * tokens * sum(len(scorer.experts) for scorer in self._routed.scorers.values())


class _Some:
    """Some of a module's experts, as they would score without the others."""

    def __init__(self, all_experts: Scorer, names: tuple[str, ...]):
        self._all = all_experts
        self._places = [place for place, name in enumerate(all_experts.experts) if name in names]
        self.experts = tuple(all_experts.experts[place] for place in self._places)

    def scores(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T E"]:
        return self._all.scores(x)[..., self._places]

    def bounded(self, x: Float[Tensor, "T I"]) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        assert isinstance(self._all, BoundedScorer)
        scores_TE, off_TE = self._all.bounded(x)
        return scores_TE[..., self._places], off_TE[..., self._places]

    def in_full(self) -> _Some:
        assert isinstance(self._all, BoundedScorer)
        some = copy(self)
        some._all = self._all.in_full()
        return some


def calibration_texts(known: Calibration | None) -> tuple[Opening, Null]:
    """What a probe takes from a calibration: what the chat template writes, and what prompts are compared with.

    Of a calibration without ordinary prompts these are the texts that it is over.
    """
    if known is None:
        return Opening(), Null(())
    opening = Opening(known.opening, known.turn, known.closing)
    if not known.null:
        return opening, Null([{"input_ids": known.input_ids, "attention_mask": known.real.long()}])
    rows = sorted((torch.tensor(row) for row in known.null), key=len)
    batches = [rows[start : start + _TOGETHER] for start in range(0, len(rows), _TOGETHER)]
    return opening, Null([_batch(some) for some in batches], ordinary=True)


def _batch(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    ids, mask = (pad_sequence(list(some), batch_first=True) for some in (rows, [torch.ones_like(row) for row in rows]))
    return {"input_ids": ids, "attention_mask": mask}
