"""SEQR: experts that share their input factor are scored at the cost of their rank squared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from spectr.routers.settings import check_settings
from spectr.selection import Weighting
from spectr.spectral import Aligned, Prepared


@dataclass(frozen=True, kw_only=True)
class Seqr:
    """The spectral score ``||delta_t x||``, exactly, by ``||M_t A x||`` where experts share ``A``.

    With ``U_t`` of the SVD of ``delta_t = c B_t A``, ``M_t = U_t^T c B_t`` is (R, R) and ``A*_t = M_t A``: ``A x`` is
    made once, then ``R^2`` multiply-adds an expert. ``||M_t A x|| = ||R_t A x||`` with the ``R_t`` of a QR
    decomposition of ``c B_t``, as the authors write it: both are ``c B_t A x`` in an orthonormal basis. Modules whose
    experts do not all share ``A`` are scored as :class:`Spectr` does.

    Attributes:
        top_k: Experts for each token and module.
        weights: ``"uniform"`` (``1 / k``) or ``"softmax"`` of the chosen scores.
        temperature: Of the softmax.
        combine: ``"outputs"``, or another of :data:`spectr.combine.COMBINATIONS`.

    Source: SEQR (Fleshman and Van Durme, 2025). Its normalisation of scores on data is not part of it; without data
    :class:`Calibrated` does that.
    """

    shares_A: ClassVar[bool] = True

    top_k: int = 1
    weights: Weighting = "uniform"
    temperature: float = 1.0
    combine: str = "outputs"

    def __post_init__(self) -> None:
        check_settings(self)

    def prepare(self, aligned: Aligned) -> Prepared:
        """See :class:`Router`."""
        return Prepared.spectral(aligned)

    def scores(
        self, x_TI: Float[Tensor, "*T I"], norms_TE: Float[Tensor, "*T E"], prototypes_EI: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`."""
        return norms_TE
