"""LAG: Arrow's prototypes make a shortlist, the spectral score chooses from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from spectr.errors import CompositionError
from spectr.routers.settings import check_settings
from spectr.selection import Weighting
from spectr.spectral import Aligned, Prepared


@dataclass(frozen=True, kw_only=True)
class Lag:
    """The ``shortlist`` largest ``|v_t . x|``, and among these experts the ``top_k`` largest ``||A*_t x||``.

    Experts that are not on a token's shortlist have the score minus infinity, and are not computed for it.

    Attributes:
        shortlist: Experts that a token's spectral score is made for; all, where a module has fewer.
        top_k: Experts for each token and module.
        weights: ``"uniform"`` (``1 / k``) or ``"softmax"`` of the chosen scores.
        temperature: Of the softmax.
        combine: ``"outputs"``, or another of :data:`spectr.combine.COMBINATIONS`.

    Source: LoRA-Augmented Generation (Fleshman and Van Durme, 2025).
    """

    shortlist: int = 20
    top_k: int = 1
    weights: Weighting = "uniform"
    temperature: float = 1.0
    combine: str = "outputs"

    def __post_init__(self) -> None:
        check_settings(self)
        if self.shortlist < self.top_k:
            raise CompositionError(
                f"shortlist={self.shortlist} and top_k={self.top_k}", expected="a shortlist of at least top_k experts"
            )

    def prepare(self, aligned: Aligned) -> Prepared:
        """See :class:`Router`."""
        return Prepared.spectral(aligned)._replace(prototype=aligned.Vh[0])

    def candidates(
        self,
        x_TI: Float[Tensor, "*T I"],
        prototypes_EI: Float[Tensor, "E I"],
        among_B1E: Bool[Tensor, "B _ E"] | None = None,
    ) -> Bool[Tensor, "*T E"]:
        """Which experts are on each token's shortlist."""
        likeness_TE = linear(x_TI, prototypes_EI).float().abs()
        if among_B1E is not None:
            likeness_TE = likeness_TE.masked_fill(~among_B1E, -torch.inf)
        index_TK = likeness_TE.topk(min(self.shortlist, likeness_TE.shape[-1]), dim=-1).indices
        listed_TE = torch.zeros_like(likeness_TE, dtype=torch.bool).scatter(-1, index_TK, True)
        return listed_TE if among_B1E is None else listed_TE & among_B1E

    def scores(
        self, x_TI: Float[Tensor, "*T I"], norms_TE: Float[Tensor, "*T E"], prototypes_EI: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`."""
        return norms_TE
