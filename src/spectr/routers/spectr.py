"""SpectR: an expert's score is the length of its own low-rank vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from spectr.routers.settings import check_settings
from spectr.selection import Weighting
from spectr.spectral import Aligned, Prepared


@dataclass(frozen=True, kw_only=True)
class Spectr:
    """Spectral routing: the ``top_k`` experts with the longest ``A*_t x``.

    Attributes:
        score: ``"spectral"``, the paper's: ``A* = S V^T``, so that the score is ``||delta_t x||``. ``"projection"``,
            the authors' released code's: ``A* = V^T`` and ``B* = U S``, so that it is the length of the projection on
            the expert's input subspace.
        top_k: Experts for each token and module.
        weights: ``"uniform"`` (``1 / k``) or ``"softmax"`` of the chosen scores.
        temperature: Of the softmax.
        combine: ``"outputs"`` (eq. 13), ``"factors"`` (eq. 10 to 12, the paper's experiments), or another of
            :data:`spectr.combine.COMBINATIONS`.

    Source: SpectR (Fleshman and Van Durme, 2025), eq. 2 to 13.
    """

    by_norms: ClassVar[bool] = True

    score: Literal["spectral", "projection"] = "spectral"
    top_k: int = 4
    weights: Weighting = "uniform"
    temperature: float = 1.0
    combine: str = "outputs"

    def __post_init__(self) -> None:
        check_settings(self, score=(self.score, ("spectral", "projection")))

    def prepare(self, aligned: Aligned) -> Prepared:
        """See :class:`Router`."""
        if self.score == "projection":
            return Prepared(aligned.Vh, aligned.U * aligned.S)
        return Prepared.spectral(aligned)

    def scores(
        self, x_TI: Float[Tensor, "*T I"], norms_TE: Float[Tensor, "*T E"], prototypes_EI: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`."""
        return norms_TE
