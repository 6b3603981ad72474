"""The weighted mean of the chosen experts' outputs, also after DARE."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from spectr.combine.combination import Combination


def outputs() -> Combination:
    """The weighted mean of the chosen experts' outputs."""
    return Combination(merge_outputs, is_sum=True)


def dare(*, density: float = 0.5) -> Combination:
    """Like :func:`outputs`, with a random share ``density`` of each output factor's entries kept and the others zero.

    Entries are dropped once, when an expert is prepared; the remaining entries are scaled up. The mean over masks is
    the original expert, for every token.

    Source: DARE (Yu et al., 2024), on the factor that SpectR's section 3.3 merges.
    """
    return Combination(merge_outputs, density)


def merge_outputs(
    h_TP: Float[Tensor, "*T P"],
    weights_TE: Float[Tensor, "*T E"],
    B_OP: Float[Tensor, "O P"],
    owner_P: Int[Tensor, " P"],
) -> Float[Tensor, "*T O"]:
    """``sum_t w_t B_t h_t``. Works with any mix of ranks, and does not depend on the signs of the singular vectors.

    Args:
        h_TP: ``A x`` of every expert.
        weights_TE: Weight of every expert; zero if it is not chosen.
        B_OP: Output factors of every expert.
        owner_P: The expert of each column of ``B_OP``.

    Source: SpectR eq. 13 (Appendix A).
    """
    return linear(h_TP * weights_TE[..., owner_P].to(h_TP.dtype), B_OP)
