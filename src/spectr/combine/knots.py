"""KnOTS among the chosen experts: TIES in the coordinates of a basis that all experts of the module share."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from spectr.combine.combination import Combination
from spectr.combine.ties import merge_ties
from spectr.spectral import Stack
from spectr.spectral.align import left_basis, without_rounding


def knots(*, density: float = 1.0) -> Combination:
    """TIES on the coordinates of the chosen experts' updates; ``density`` is the share of coordinates that is kept."""
    return Combination(partial(merge_knots, density=density), prepare=coordinates)


@torch.no_grad()
def coordinates(stack: Stack) -> tuple[Float[Tensor, "Q P"], Float[Tensor, "O Q"]]:
    """``U^T B_t`` of every expert, and the basis ``U`` of ``[delta_1 ... delta_E] = U S [V_1^T ... V_E^T]``.

    Args:
        stack: All experts of a module; a new expert changes the basis.
    """
    parts = stack.parts().values()
    U_OQ, _ = left_basis((part.A, part.B) for part in parts)
    C_QP = torch.cat([without_rounding(U_OQ.mT @ part.B.float(), part.B.float().norm(dim=0)) for part in parts], dim=1)
    return C_QP.to(stack.B_OP.dtype), U_OQ.to(stack.B_OP.dtype)


def merge_knots(
    h_TP: Float[Tensor, "*T P"],
    weights_TE: Float[Tensor, "*T E"],
    C_QP: Float[Tensor, "Q P"],
    owner_P: Int[Tensor, " P"],
    U_OQ: Float[Tensor, "O Q"],
    *,
    density: float = 1.0,
) -> Float[Tensor, "*T O"]:
    """``U * ties(c_t)`` with the coordinates ``c_t = U^T delta_t x = (U^T B_t) h_t`` of each expert's update.

    Applies :func:`spectr.combine.merge_ties` to the vectors ``c_t`` instead of the outputs ``y_t = U c_t``. Each expert
    keeps its largest coordinates, each coordinate elects a sign, and the weighted mean counts coordinates that agree.

    ``spectr merge --method knots`` applies TIES to the matrices ``S V_t^T``. Here each matrix is applied to the token
    first, ``c_t = (S V_t^T) x``, and TIES to the result. There the basis belongs to the merged experts with their
    weights. Here it belongs to all experts of the module with weight 1, so that it is computed once instead of for each
    choice. The signs of the columns of ``U`` do not matter.

    Args:
        h_TP: ``A x`` of every expert.
        weights_TE: Weight of every expert; zero if it is not chosen.
        C_QP: Coordinates of their output factors, ``U^T B_t``.
        owner_P: The expert of each column of ``C_QP``.
        U_OQ: The basis.
        density: Share of coordinates that is kept, above 0 and at most 1.

    Source: KnOTS (Stoica et al., 2024), section 4, with TIES-Merging (Yadav et al., 2023).
    """
    return linear(merge_ties(h_TP, weights_TE, C_QP, owner_P, density=density), U_OQ)
