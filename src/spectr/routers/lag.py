"""LAG: Arrow's prototypes select a shortlist, and the spectral score chooses from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from spectr.errors import CompositionError
from spectr.routers.router import ShortlistRouter
from spectr.selection import TopK, Weighting, largest
from spectr.spectral import AlignedExpert, Share, SideData, State, segment_norms


class Prototypes(NamedTuple):
    """Each expert's ``v_t``."""

    prototypes_EI: Float[Tensor, "E I"]


@dataclass(frozen=True, kw_only=True)
class Lag(ShortlistRouter):
    """The ``shortlist`` largest ``|v_t . x|``, and among these experts the ``top_k`` largest ``||A*_t x||``.

    Experts that are not on a token's shortlist score minus infinity, and are not computed.

    Attributes:
        shortlist: Number of experts with a spectral score per token; all if a layer has fewer.
        top_k: Experts per token and layer.
        weights: ``"uniform"`` (``1 / k``) or ``"softmax"`` of the chosen scores.
        temperature: Temperature of the softmax.
        combine: ``"outputs"``, or another name in :data:`spectr.combine.COMBINATIONS`.

    Source: LoRA-Augmented Generation (Fleshman and Van Durme, 2025).
    """

    reads = "xh"

    shortlist: int = 20
    top_k: int = 1
    weights: Weighting = "uniform"
    temperature: float = 1.0
    combine: str = "outputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortlist < self.top_k:
            raise CompositionError(
                f"shortlist={self.shortlist} and top_k={self.top_k}", expected="a shortlist of at least top_k experts"
            )

    @property
    def selection(self) -> TopK:
        """See :class:`Router`."""
        return TopK(k=self.top_k, weighting=self.weights, temperature=self.temperature)

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`: the prototype is ``v_t``."""
        return Share.spectral(expert.aligned)._replace(own=Prototypes(expert.aligned.Vh[:1]))

    def candidates(
        self, state: State, x_TI: Float[Tensor, "*T I"], allowed_TE: Bool[Tensor, "*B E"] | None = None
    ) -> Bool[Tensor, "*T E"]:
        """See :class:`ShortlistRouter`: the experts with the largest ``|v_t . x|``."""
        likeness_TE = linear(x_TI, state.own.prototypes_EI).float().abs()
        if allowed_TE is not None:
            likeness_TE = likeness_TE.masked_fill(~allowed_TE, -torch.inf)
        _, index_TK = largest(likeness_TE, min(self.shortlist, likeness_TE.shape[-1]))
        listed_TE = torch.zeros_like(likeness_TE, dtype=torch.bool).scatter(-1, index_TK, 1)
        return listed_TE if allowed_TE is None else listed_TE & allowed_TE

    def listed_scores(
        self, state: State, h_TP: Float[Tensor, "*T P"], listed_TE: Bool[Tensor, "*T E"]
    ) -> Float[Tensor, "*T E"]:
        """See :class:`ShortlistRouter`: ``||A*_t x||``, and minus infinity for the others."""
        return segment_norms(h_TP, state).masked_fill(~listed_TE, -torch.inf)

    def scores(
        self,
        state: State,
        x_TI: Float[Tensor, "*T I"],
        h_TP: Float[Tensor, "*T P"],
        allowed_TE: Bool[Tensor, "*B E"] | None,
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: both steps."""
        return self.listed_scores(state, h_TP, self.candidates(state, x_TI, allowed_TE))
