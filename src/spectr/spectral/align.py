"""Spectral alignment: the SVD of ``scale * B @ A`` from its factors, without forming the product."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_NULL = 1e-6  # singular values below this share of the largest one are rounding of float32


class Aligned(NamedTuple):
    """Thin SVD ``delta = U @ diag(S) @ Vh``, float32, for one pair of factors or a batch of them."""

    U: Float[Tensor, "*N O R"]
    S: Float[Tensor, "*N R"]
    Vh: Float[Tensor, "*N R I"]


def align(A_NRI: Float[Tensor, "*N R I"], B_NOR: Float[Tensor, "*N O R"], scale: float | Tensor) -> Aligned:
    """The SVD of low-rank updates, ``U S V^T = scale * B A``.

    Example:
        >>> A, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [2.0]])
        >>> U, S, Vh = align(A, B, scale=0.5)
        >>> round(S.item(), 4)  # 0.5 * 2 * 5, the length of the only direction
        5.0

    ``scale B = Q_b R_b`` and ``A^T = Q_a R_a`` are QR decompositions, ``R_b R_a^T = u S v^T`` a small SVD; then
    ``U = Q_b u`` and ``V = Q_a v``. Signs: in each row of ``V^T`` the entry of the largest magnitude is positive.
    Directions whose singular value is zero (to float32 rounding) are zero in ``U`` and ``V^T`` too, so that
    ``||V^T x||`` is the length of x's projection on the input subspace at any effective rank.

    Args:
        A_NRI: Input factors, any floating dtype; computed in float32.
        B_NOR: Output factors.
        scale: One number, or one for each pair (shape (N,)).

    Returns:
        ``U`` (N, O, R), ``S`` (N, R) descending, ``V^T`` (N, R, I), float32; with R = min(R, O, I).

    Source: SpectR (Fleshman and Van Durme, 2025), eq. 2 and 3.
    """
    A, B = A_NRI.float(), B_NOR.float()
    B = B * (scale.to(B)[..., None, None] if isinstance(scale, Tensor) else scale)
    Q_b, R_b = torch.linalg.qr(B)
    Q_a, R_a = torch.linalg.qr(A.mT)
    u, S, vh = torch.linalg.svd(R_b @ R_a.mT, full_matrices=False)
    U, Vh = Q_b @ u, vh @ Q_a.mT
    peak = Vh.gather(-1, Vh.abs().argmax(-1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(Vh)
    alive = (_NULL * S[..., :1] < S).to(S.dtype)
    return Aligned(U * sign.mT * alive[..., None, :], S * alive, Vh * sign * alive[..., None])


def left_basis(
    pairs: Iterable[tuple[Float[Tensor, "_R I"], Float[Tensor, "O _R"]]],
) -> tuple[Float[Tensor, "O Q"], Float[Tensor, " Q"]]:
    """``U`` and ``S`` of ``[delta_1 ... delta_E] = U diag(S) [V_1^T ... V_E^T]`` with ``delta_t = B_t A_t``.

    The updates are not formed: with ``A_t^T = Q_t R_t`` the matrix is ``[B_1 R_1^T ... B_E R_E^T]`` times a matrix with
    orthonormal rows, so that both have the same ``U`` and ``S``. Each column of ``U`` has an arbitrary sign.

    Args:
        pairs: ``(A_t, B_t)`` of each expert, of any ranks; computed in float32.

    Returns:
        The directions whose singular value is not zero to float32 rounding, and these values, descending. Q is at most
        the sum of the ranks, and at most O.

    Source: KnOTS (Stoica et al., 2024), section 4.
    """
    small = [B.float() @ torch.linalg.qr(A.float().mT, mode="r").R.mT for A, B in pairs]
    U, S, _ = torch.linalg.svd(torch.cat(small, dim=1), full_matrices=False)
    alive = _NULL * S[:1] < S
    return U[:, alive], S[alive]


def without_rounding(x: Tensor, size: Tensor) -> Tensor:
    """``x`` with exact zeros in place of rounding errors at ``size``, whose signs TIES would count."""
    return x * (x.abs() > _NULL * size)
