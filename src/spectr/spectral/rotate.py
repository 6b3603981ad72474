"""Alignment as small square matrices: the part of an SVD to store when the factors are on disk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.spectral.align import Aligned

_WELL = 1e-4  # least over largest diagonal entry of a Cholesky factor: below, float64 has no digits to spare
_OFF = 2e-5  # how far U and V may be from orthonormal, once their rotations are rounded to float32


class Rotation(NamedTuple):
    """``U = scale * B @ left``, ``V^T = right @ A``: an aligned pair of factors, expressed by the adapter's own
    factors.

    Two (R, R) matrices replace (O, R) and (R, I): a seventieth of the size for rank 8 and 576 inputs and outputs.
    """

    left: Float[Tensor, "*N R R"]
    S: Float[Tensor, "*N R"]
    right: Float[Tensor, "*N R R"]

    def applied(self, A_NRI: Float[Tensor, "*N R I"], B_NOR: Float[Tensor, "*N O R"], scale: float | Tensor) -> Aligned:
        """What :func:`spectr.spectral.align` returns for these factors, float32.

        Args:
            A_NRI: Input factors.
            B_NOR: Output factors.
            scale: One number, or one for each pair (shape (N,)).
        """
        factor = torch.as_tensor(scale, dtype=torch.float32)[..., None, None]
        return Aligned(B_NOR.float() @ (self.left * factor), self.S, self.right @ A_NRI.float())


def rotate(
    A_NRI: Float[Tensor, "*N R I"], B_NOR: Float[Tensor, "*N O R"], scale: float | Tensor
) -> tuple[Rotation, Tensor]:
    """The SVD of low-rank updates by the Cholesky factors of ``A A^T`` and ``B^T B``, in float64.

    With ``A A^T = L_a L_a^T`` and ``B^T B = L_b L_b^T`` the update is ``(B L_b^-T) (c L_b^T L_a) (L_a^-1 A)``, whose
    outer parts are orthonormal; the SVD ``u S v^T`` of the small part in the middle gives ``left = L_b^-T u / c`` and
    ``right = v^T L_a^-1``.

    Args:
        A_NRI: Input factors, any floating dtype.
        B_NOR: Output factors.
        scale: One number, or one for each pair (shape (N,)).

    Returns:
        The rotation, float32, and a mask of valid pairs, (N,) or (). Their factors have full rank with such
        a margin that ``U`` and ``V`` are orthonormal to 2e-5 in float32. Align the others by
        :func:`spectr.spectral.align`.

    Source: SpectR (Fleshman and Van Durme, 2025), eq. 2 and 3, computed in another way.
    """
    scale_N = torch.as_tensor(scale, dtype=torch.float64)
    factor = scale_N[..., None, None]
    A, B = A_NRI.double(), B_NOR.double()
    gram_a, gram_b = A @ A.mT, B.mT @ B
    L_a, bad_a = torch.linalg.cholesky_ex(gram_a)
    L_b, bad_b = torch.linalg.cholesky_ex(gram_b)
    holds = (bad_a == 0) & (bad_b == 0) & _well(L_a) & _well(L_b) & (scale_N != 0)
    identity = torch.eye(A.shape[-2], dtype=A.dtype)
    safe = holds[..., None, None]
    L_a, L_b = torch.where(safe, L_a, identity), torch.where(safe, L_b, identity)
    u, S, vh = torch.linalg.svd(factor * (L_b.mT @ L_a))
    right = torch.linalg.solve_triangular(L_a, vh, upper=False, left=False)
    left = torch.linalg.solve_triangular(L_b.mT, u, upper=True) / torch.where(factor == 0, 1.0, factor)
    Vh = right.float() @ A_NRI.float()
    sign = torch.where(-Vh.amin(-1, keepdim=True) > Vh.amax(-1, keepdim=True), -1.0, 1.0).to(Vh)
    found = Rotation((left * sign.mT).float(), S.float(), (right * sign).float())
    turned_b, turned_a = found.left.double() * factor, found.right.double()
    for gram in (turned_b.mT @ gram_b @ turned_b, turned_a @ gram_a @ turned_a.mT):  # of U and V after rounding
        holds &= (gram - identity).abs().amax((-2, -1)) < _OFF
    return found, holds


def _well(L_NRR: Tensor) -> Tensor:
    diagonal_NR = L_NRR.diagonal(dim1=-2, dim2=-1).abs()
    return diagonal_NR.amin(-1) > _WELL * diagonal_NR.amax(-1)
