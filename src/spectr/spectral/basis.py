"""A left basis that several low-rank updates share, as KnOTS needs it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDING = 1e-6  # a share of the largest value: what is smaller is rounding of float32


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
    alive = ROUNDING * S[:1] < S
    return U[:, alive], S[alive]


def without_rounding(x: Tensor, size: Tensor) -> Tensor:
    """``x`` with exact zeros where it is rounding at ``size``: in TIES the sign of rounding would have a vote."""
    return x * (x.abs() > ROUNDING * size)
