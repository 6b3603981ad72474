"""Routing among very many experts: a prompt's shortlist, and a router for each token among those on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.routers.base import PromptRouter, Router
from spectr.routers.calibrated import Calibrated, soft_vote, vote_bounds
from spectr.routers.settings import depends_on_residents
from spectr.spectral import Aligned, Prepared


def _informed() -> Router:
    return Calibrated(level="prior")


@dataclass(frozen=True, kw_only=True)
class Shortlist:
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
        level = self.local.level if isinstance(self.local, PromptRouter) else "token"
        if level in ("prompt", "shortlist") or hasattr(self.local, "guided") or hasattr(self.local, "resident"):
            raise CompositionError(
                f"local={self.local!r} does not decide for each token among those it is given",
                expected="a router for each token, such as Spectr(top_k=4), or Calibrated(level='prior')",
                do="for one expert a prompt: Shortlist(size=1)",
            )
        if depends_on_residents(self.local):
            raise CompositionError(
                f"local={self.local!r} merges by all experts in memory, which change with the prompts of a batch",
                expected="another combination than 'knots'",
                do="leave combine out, or use a router that holds all experts",
            )
        if 1 < self.size < getattr(self.local, "top_k", 1):
            raise CompositionError(
                f"a shortlist of {self.size}, of which {self.local!r} is to take {getattr(self.local, 'top_k', 1)}",
                expected="a size of at least top_k",
            )

    @property
    def level(self) -> str:
        """See :class:`PromptRouter`: ``"prompt"`` for a shortlist of one, else ``"shortlist"``."""
        return "prompt" if self.size == 1 else "shortlist"

    @property
    def certain(self) -> bool:
        """Whether the list has to be the one that prototypes in full give."""
        return self.bits > 8

    @property
    def informs(self) -> bool:
        """Whether the prompt's evidence informs the local router's scores too."""
        return self.size > 1 and isinstance(self.local, PromptRouter) and self.local.level == "prior"

    def prepare(self, aligned: Aligned) -> Prepared:
        """See :class:`Router`: as the local router does."""
        return self.local.prepare(aligned)

    def scores(
        self, x_TI: Float[Tensor, "*T I"], norms_TE: Float[Tensor, "*T E"], prototypes_EI: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: the local router's."""
        return self.local.scores(x_TI, norms_TE, prototypes_EI)

    def evidence(self, scores_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T E"]:
        """See :class:`ProbingRouter`: the soft vote, times the number of experts."""
        return soft_vote(scores_TE, self.pool_temperature)

    def bounds(
        self, scores_TE: Float[Tensor, "*T E"], off_TE: Float[Tensor, "*T E"]
    ) -> tuple[Float[Tensor, "*T E"], Float[Tensor, "*T E"]]:
        """The least and the most that the evidence can be, where scores may be off by so much; float64."""
        return vote_bounds(scores_TE, off_TE, self.pool_temperature)

    def certainty(self, evidence_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T"]:
        """See :class:`ProbingRouter`: all tokens count alike."""
        return torch.ones_like(evidence_TE[..., 0])

    def verdict(self, evidence_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """See :class:`PromptRouter`: zero for experts off the shortlist; of the others the prior, or alike."""
        index_BK = evidence_BE.topk(min(self.size, evidence_BE.shape[-1]), dim=-1).indices
        listed_BE = torch.zeros_like(evidence_BE).scatter(-1, index_BK, 1.0)
        if self.informs:
            local: Any = self.local
            return (local.verdict(evidence_BE) * listed_BE).float()
        return (listed_BE / index_BK.shape[-1]).float()

    def informed(self, scores_TE: Float[Tensor, "*T E"], prior_B1E: Float[Tensor, "B _ E"]) -> Float[Tensor, "*T E"]:
        """See :class:`PromptRouter`: as the local router does."""
        local: Any = self.local
        return local.informed(scores_TE, prior_B1E) if self.informs else scores_TE
