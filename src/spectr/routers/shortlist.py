"""Routing among very many experts: a prompt's shortlist, and a router for each token among those on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.library.needs import GATED, Indexed, Need, OneExpert
from spectr.routers.base import GuidedRouter, PagedRouter, PromptRouter, Router
from spectr.routers.calibrated import Calibrated, soft_vote, vote_bounds
from spectr.routers.use import HoldWeights, KeepShortlist, Use
from spectr.selection import All
from spectr.spectral import AlignedExpert, InputState, Share, SideData, Stack, State


def _informed() -> Router:
    return Calibrated(level="prior")


@dataclass(frozen=True, kw_only=True)
class Shortlist(PagedRouter):
    """For each prompt the ``size`` experts that its words call for; among these ``local`` decides for each token.

    The shortlist is the calibrated decision of :class:`Calibrated`, made with one direction of each expert in place of
    all: ``|v_t . (x - m)|`` over its root mean square on the calibration's texts, ``v_t`` the first row of ``V^T``
    (Arrow's prototype), pooled by soft votes over tokens and modules, less what is usual. Only the prototypes are in
    memory, in 8 bits; the experts on the shortlist are read from disk when a prompt calls for them. After the prompt
    an answer costs the same whatever the size of the library.

    Needs a calibrated and indexed library (:func:`spectr.build_index`).

    Attributes:
        size: Experts on a prompt's shortlist. One is held for the whole answer, and ``local`` has nothing to decide.
        local: Decides for each token and module among them; any router that does so, and :class:`Calibrated` with the
            level ``"prior"``, which the prompt's evidence informs.
        probe_tokens: Tokens of a prompt that are read for the decision at most.
        heard: Last parts of the names of the modules that take part in it, such as ``("q_proj", "k_proj")``; no
            prototypes of others are in memory. None given: all do.
        every: Every which of these takes part; more costs less and finds less.
        bits: Of each number of a prototype in memory: 8, 16 or 32. From 16 on the list is certain: it is the one that
            prototypes in full give, in real numbers. 16 bits bound each expert's evidence; where that does not decide
            the list, the prototypes are read in full.
        pool_temperature: Of the soft votes.

    Source: ours, with the prototypes of Arrow (Ostapenko et al., 2024) and the two steps of LAG (Fleshman and Van
    Durme, 2025); see docs/scale.md.
    """

    size: int = 16
    local: Router = field(default_factory=_informed)
    probe_tokens: int = 256
    heard: tuple[str, ...] = ()
    every: int = 1
    bits: int = 8
    pool_temperature: float = 0.2

    def __post_init__(self) -> None:
        for name in ("size", "probe_tokens", "every"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CompositionError(f"{name}={value}", expected="a whole number of at least 1")
        if isinstance(self.heard, str) or not all(isinstance(part, str) and part for part in self.heard):
            raise CompositionError(f"heard={self.heard!r}", expected='a tuple of names, such as ("q_proj", "k_proj")')
        if self.bits not in (8, 16, 32):
            raise CompositionError(f"bits={self.bits}", expected="8, or for a list that is certain 16 or 32")
        if not self.pool_temperature > 0:
            raise CompositionError(f"pool_temperature={self.pool_temperature}", expected="a number above zero")
        if isinstance(self.local, type) or not isinstance(self.local, Router):
            raise CompositionError(
                f"local={self.local!r} is no router", expected="a router object, as in Spectr(top_k=4)"
            )
        one = any(isinstance(need, OneExpert) for need in self.local.needs)
        gathers = self.local.use is not None and self.local.use.gathers
        if gathers or one or isinstance(self.local, GuidedRouter):
            raise CompositionError(
                f"local={self.local!r} does not decide for each token among those it is given",
                expected="a router for each token, such as Spectr(top_k=4), or Calibrated(level='prior')",
                do="for one expert a prompt: Shortlist(size=1)",
            )
        if self.local.combination.depends_on_residents:
            raise CompositionError(
                f"local={self.local!r} merges by all experts in memory, which change with the prompts of a batch",
                expected="another combination than 'knots'",
                do="leave combine out, or use a router that holds all experts",
            )
        most = self.local.selection.k or 1
        if 1 < self.size < most:
            raise CompositionError(
                f"a shortlist of {self.size}, of which {self.local!r} is to take {most}",
                expected="a size of at least top_k",
            )

    @property
    def selection(self) -> All:
        """See :class:`Router`: all on the list are held."""
        return All()

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`: an index, and gates where the local router reads them."""
        return (Indexed(self.certain), *(need for need in self.local.needs if need == GATED))

    @property
    def use(self) -> Use:
        """See :class:`Router`: of a list of one, its weight."""
        return HoldWeights() if self.size == 1 else KeepShortlist(self._informing is not None)

    @property
    def _informing(self) -> PromptRouter | None:
        """The local router, where the prompt's evidence informs its scores too."""
        local = self.local
        return local if self.size > 1 and isinstance(local, PromptRouter) and local.use is not None else None

    @property
    def certain(self) -> bool:
        """See :class:`PagedRouter`."""
        return self.bits > 8

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`: the local router's share."""
        return self.local.init_expert(expert, side)

    def stack(self, shares: Mapping[str, Share]) -> Stack:
        """See :class:`Router`: as the local router."""
        return self.local.stack(shares)

    def inputs(self, state: InputState, x_TI: Float[Tensor, "*T I"]) -> Float[Tensor, "*T P"]:
        """See :class:`Router`: as the local router."""
        return self.local.inputs(state, x_TI)

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Float[Tensor, "*T P"], allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: the local router's."""
        return self.local.scores(state, x_TI, h_TP, allowed_TE)

    def evidence(self, scores_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T E"]:
        """See :class:`ProbingRouter`: the soft vote, times the number of experts."""
        return soft_vote(scores_TE, self.pool_temperature)

    def bounds(
        self, scores_TE: Float[Tensor, "*T E"], off_TE: Float[Tensor, "*T E"]
    ) -> tuple[Float[Tensor, "*T E"], Float[Tensor, "*T E"]]:
        """See :class:`PagedRouter`."""
        return vote_bounds(scores_TE, off_TE, self.pool_temperature)

    def certainty(self, evidence_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T"]:
        """See :class:`ProbingRouter`: all tokens count alike."""
        return torch.ones_like(evidence_TE[..., 0])

    def verdict(self, evidence_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """See :class:`PromptRouter`: zero for experts off the shortlist; of the others the prior, or alike."""
        index_BK = evidence_BE.topk(min(self.size, evidence_BE.shape[-1]), dim=-1).indices
        listed_BE = torch.zeros_like(evidence_BE).scatter(-1, index_BK, 1.0)
        if self._informing is not None:
            return (self._informing.verdict(evidence_BE) * listed_BE).float()
        return (listed_BE / index_BK.shape[-1]).float()

    def informed(self, scores_TE: Float[Tensor, "*T E"], prior_B1E: Float[Tensor, "B _ E"]) -> Float[Tensor, "*T E"]:
        """See :class:`PromptRouter`: as the local router does."""
        return scores_TE if self._informing is None else self._informing.informed(scores_TE, prior_B1E)
