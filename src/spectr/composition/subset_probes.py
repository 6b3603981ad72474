"""What reads prompts of a composed model for a set of its experts, as it would if it held no others."""

from __future__ import annotations

from collections import OrderedDict
from copy import copy
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from spectr.library import Calibration, ExpertLibrary
from spectr.prompts.bounds import BoundedScorer
from spectr.prompts.chat_template import Opening
from spectr.prompts.decision import entry_of
from spectr.prompts.probe import Probe, Scorer, evidence_among
from spectr.routers.evidence import Guide, ModuleEvidence, ModuleScores, Reader

if TYPE_CHECKING:
    from spectr.composition.routed import Routed

_KEPT = 64  # sets whose reader is kept


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
        self._baseline: dict[str, ModuleScores] | None = None

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
        read = [module for module in layers if module in scorers and scorers[module].experts][:: evidence.module_stride]
        opening, texts = calibration_texts(routed.library.calibration)
        probe = Probe(
            entry_of(routed.model),
            {module: layers[module] for module in read},
            {module: scorers[module] for module in read},
            evidence,
            experts,
            opening,
            texts,
            self._baseline_of(evidence, opening, texts, experts),
        )
        return routed.reader(probe)

    def _baseline_of(
        self, evidence: ModuleEvidence, opening: Opening | None, texts: dict[str, Tensor] | None, names: tuple[str, ...]
    ) -> Tensor | None:
        """The evidence of some experts on the calibration's texts, which are read once for all sets.

        ``None`` leaves it to the probe: of all experts, or where scores are too many to be kept.
        """
        routed = self._routed
        if texts is None or evidence.reads != "scores" or names == routed.experts:
            return None
        if self._baseline is None:
            device = next(routed.model.parameters()).device
            probe = Probe(entry_of(routed.model), routed.layers, routed.scorers, evidence, routed.experts, opening)
            self._baseline = probe.scores(**{key: text.to(device) for key, text in texts.items()})
        holders = {module: routed.scorers[module].experts for module in self._baseline}
        return evidence_among(self._baseline, holders, evidence, names)


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


def calibration_texts(known: Calibration | None) -> tuple[Opening | None, dict[str, Tensor] | None]:
    """What a probe takes from a calibration: what the chat template writes, and the baseline's texts."""
    if known is None:
        return None, None
    texts = {"input_ids": known.input_ids, "attention_mask": known.real.long()}
    return Opening(known.opening, known.turn, known.closing), texts
