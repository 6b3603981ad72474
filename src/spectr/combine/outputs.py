"""The weighted mean of the chosen experts' outputs. Also after DARE."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from spectr.combine.base import Combination


def outputs() -> Combination:
    """The weighted mean of the chosen experts' outputs."""
    return Combination(merge_outputs, is_sum=True)


def dare(*, density: float = 0.5) -> Combination:
    """The same, where a random share ``density`` of each output factor's entries is kept and the rest is zero.

    Entries are dropped once, when an expert is prepared, and the others enlarged to make up for it. The mean over masks
    is the expert itself, for any token.

    Source: DARE (Yu et al., 2024), on the factor that SpectR's section 3.3 merges.
    """
    return Combination(merge_outputs, density)


def merge_outputs(
    h_TP: Float[Tensor, "*T P"],
    weights_TE: Float[Tensor, "*T E"],
    B_OP: Float[Tensor, "O P"],
    owner_P: Int[Tensor, " P"],
) -> Float[Tensor, "*T O"]:
    """``sum_t w_t B_t h_t``, any mix of ranks, the same for any signs of the singular vectors.

    Args:
        h_TP: ``A x`` of every expert.
        weights_TE: Weight of every expert, zero where it is not chosen.
        B_OP: Output factors of every expert.
        owner_P: Which expert a column of ``B_OP`` belongs to.

    Source: SpectR eq. 13 (Appendix A).
    """
    return linear(h_TP * weights_TE[..., owner_P].to(h_TP.dtype), B_OP)
