"""Updates as pairs of factors, and truncating an update to a rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.adapters import Factors
from spectr.spectral import align

_NOTHING = 1e-14  # share of the factors' squared norms, below which a product is float32 rounding
_NULL = 1e-12  # share of the largest eigenvalue, below which an eigenvalue is rounding


class LowRank(NamedTuple):
    """One module's update ``delta = B @ A``, float32, with its scale in ``B``; rank 0 is an update of zero."""

    B: Float[Tensor, "O R"]
    A: Float[Tensor, "R I"]

    @staticmethod
    def of(factors: Factors) -> LowRank:
        """A module's factors in an adapter."""
        return LowRank(factors.B.float() * factors.scale, factors.A.float())

    @staticmethod
    def zero(outputs: int, inputs: int) -> LowRank:
        """The update of a module that an expert does not adapt."""
        B, A = torch.zeros(outputs, 0, dtype=torch.float32), torch.zeros(0, inputs, dtype=torch.float32)
        return LowRank(B, A)

    @staticmethod
    def joined(parts: Iterable[LowRank]) -> LowRank:
        """The exact sum of updates: concatenated factors, whose rank is the sum of the ranks."""
        B, A = zip(*parts, strict=True)
        return LowRank(torch.cat(B, dim=1), torch.cat(A))

    @property
    def rank(self) -> int:
        """Columns of ``B``."""
        return self.A.shape[0]

    def times(self, factor: float) -> LowRank:
        """The update multiplied by a number."""
        return LowRank(self.B * factor, self.A)

    def dense(self) -> Float[Tensor, "O I"]:
        """The product, (O, I)."""
        return self.B @ self.A


class Cut(NamedTuple):
    """An update of a chosen rank, and the share of ``||delta||^2`` (Frobenius) that it keeps."""

    delta: LowRank
    energy: float


def cut_factors(delta: LowRank, rank: int | None = None, energy: float | None = None) -> Cut:
    """The best low-rank approximation, from QR decompositions and a small SVD; the product is never formed.

    Args:
        delta: Factors, float32.
        rank: Maximum number of directions.
        energy: Keep the fewest directions with this share of ``||delta||^2``, above 0, at most 1.

    Returns:
        Factors of at most that rank. The given factors if neither limit is given or they are within it. Rank 0 if the
            product is zero up to float32 rounding.

    Source: Eckart and Young (1936); the SVD is :func:`spectr.spectral.align`.
    """
    if _is_zero(delta):
        return Cut(LowRank.zero(delta.B.shape[0], delta.A.shape[1]), 1.0)
    if energy is None and (rank is None or rank >= delta.rank):
        return Cut(delta, 1.0)
    U, S, Vh = align(delta.A, delta.B, 1.0)
    squares = S.double() ** 2
    kept = _kept(squares, rank, energy)
    return Cut(LowRank(U[:, :kept], S[:kept, None] * Vh[:kept]), _share(squares, kept))


def cut_dense(delta: Float[Tensor, "O I"], rank: int | None = None, energy: float | None = None) -> Cut:
    """The best low-rank approximation of a dense update: its projection on its first singular vectors.

    The singular vectors of the shorter side are eigenvectors of the Gram matrix, computed in float64. Their error is at
    most that of a float32 SVD, at a fraction of its cost.

    Args:
        delta: (O, I), float32.
        rank: See :func:`cut_factors`.
        energy: See :func:`cut_factors`.

    Returns:
        ``B`` with orthonormal columns and ``A = B^T delta``, or the equivalent for the other side.

    Source: Eckart and Young (1936).
    """
    if delta.shape[0] > delta.shape[1]:
        (B, A), energy_kept = cut_dense(delta.mT, rank, energy)
        return Cut(LowRank(A.mT.contiguous(), B.mT.contiguous()), energy_kept)
    wide = delta.double()
    ascending, vectors = torch.linalg.eigh(wide @ wide.mT)
    squares = ascending.flip(0).clamp(min=0)
    kept = _kept(squares, rank, energy)
    U = vectors.flip(1)[:, :kept]
    return Cut(LowRank(U.float(), (U.mT @ wide).float()), _share(squares, kept))


def _is_zero(delta: LowRank) -> bool:
    B, A = delta.B.double(), delta.A.double()
    square = ((B.mT @ B) * (A @ A.mT)).sum()
    return bool(square <= _NOTHING * (B**2).sum() * (A**2).sum())


def _kept(squares_R: Float[Tensor, " R"], rank: int | None, energy: float | None) -> int:
    """How many of the squared singular values (descending) are kept."""
    alive = int((squares_R > _NULL * squares_R[0]).sum())
    if energy is not None:
        reached = squares_R.cumsum(0) >= energy * squares_R.sum() * (1 - _NULL)
        alive = min(alive, int(reached.int().argmax()) + 1)
    return min(alive, rank) if rank is not None else alive


def _share(squares_R: Float[Tensor, " R"], kept: int) -> float:
    return float(squares_R[:kept].sum() / squares_R.sum()) if squares_R.any() else 1.0
