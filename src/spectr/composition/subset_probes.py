"""What reads prompts for a set of experts, as it would where no other expert is there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from copy import copy

from jaxtyping import Float
from torch import Tensor

from spectr.composition.routed import Routed, calibration_texts
from spectr.prompts.bounds import BoundedVoter
from spectr.prompts.chat_template import Opening
from spectr.prompts.decision import Reader, entry_of
from spectr.prompts.probe import Heard, Probe, Voter
from spectr.routers import PagedRouter, ProbingRouter

_KEPT = 64  # sets whose reader is kept


class Readers:
    """A composed model's readers by set; those that were asked for last are kept.

    Args:
        routed: The composed model. Its layers have to be asleep whenever a reader reads.
    """

    def __init__(self, routed: Routed):
        self._routed, self._readers = routed, OrderedDict[tuple[str, ...], Reader]()
        self._heard: dict[str, Heard] | None = None

    def of(self, names: tuple[str, ...]) -> Reader:
        """What reads for these experts."""
        if names not in self._readers:
            self._readers[names] = self._make(names)
            while len(self._readers) > _KEPT:
                self._readers.popitem(last=False)
        self._readers.move_to_end(names)
        return self._readers[names]

    def _make(self, names: tuple[str, ...]) -> Reader:
        routed, router = self._routed, self._routed.router
        if not isinstance(router, ProbingRouter):
            assert routed.guide is not None
            return routed.guide.reader(routed.library.descriptions, names)
        voters = {module: _Some(voter, names) for module, voter in routed.voters.items()}
        known = [module for module in routed.layers if module in voters and voters[module].experts]
        heard = known[:: router.every]
        layers = {module: layer for module, layer in routed.layers.items() if module in heard}
        opening, usual = calibration_texts(routed.library.calibration)
        usual_E = None
        if usual is not None and not isinstance(router, PagedRouter):  # whose scores are too many to be kept
            usual_E = self._usual(router, opening, usual, names)
        some = {module: voters[module] for module in heard}
        return routed.reader(Probe(entry_of(routed.model), layers, some, router, names, opening, usual, usual_E))

    def _usual(
        self, router: ProbingRouter, opening: Opening | None, texts: Mapping[str, Tensor], names: tuple[str, ...]
    ) -> Tensor:
        """What a set's experts have on the calibration's texts, which are read once for all sets."""
        routed = self._routed
        probe = Probe(entry_of(routed.model), routed.layers, routed.voters, router, routed.experts, opening)
        if self._heard is None:
            device = next(routed.model.parameters()).device
            self._heard = probe.hear(**{key: text.to(device) for key, text in texts.items()})
        return probe.evidence_of(self._heard, names).mean(0)


class _Some:
    """Some of a module's experts, as they would score without the others."""

    def __init__(self, everyone: Voter, names: tuple[str, ...]):
        self._everyone = everyone
        self._places = [place for place, name in enumerate(everyone.experts) if name in names]
        self.experts = tuple(everyone.experts[place] for place in self._places)

    def scores(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T E"]:
        return self._everyone.scores(x)[..., self._places]

    def bounded(self, x: Float[Tensor, "T I"]) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        assert isinstance(self._everyone, BoundedVoter)
        scores_TE, off_TE = self._everyone.bounded(x)
        return scores_TE[..., self._places], off_TE[..., self._places]

    def in_full(self) -> _Some:
        assert isinstance(self._everyone, BoundedVoter)
        some = copy(self)
        some._everyone = self._everyone.in_full()
        return some
