"""TIES across the chosen experts: trim each update, elect signs, average the entries that agree. Also after DARE."""

from __future__ import annotations

from functools import partial

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from spectr.combine.combination import Combination
from spectr.spectral.sparsify import elect_and_mean, trim


def ties(*, density: float = 0.2) -> Combination:
    """TIES on the chosen experts' updates of a token; ``density`` is the share of entries that is kept."""
    return Combination(partial(merge_ties, density=density))


def dare_ties(*, density: float = 0.5, trim: float = 1.0) -> Combination:
    """DARE with ``density``, then TIES that keeps the share ``trim``; by default DARE replaces the trimming.

    Source: DARE (Yu et al., 2024) with TIES-Merging (Yadav et al., 2023).
    """
    return Combination(partial(merge_ties, density=trim), density)


def merge_ties(
    h_TP: Float[Tensor, "*T P"],
    weights_TE: Float[Tensor, "*T E"],
    B_OP: Float[Tensor, "O P"],
    owner_P: Int[Tensor, " P"],
    *,
    density: float = 0.2,
) -> Float[Tensor, "*T O"]:
    """TIES of the chosen experts' output vectors ``y_t = B_t h_t``.

    Each ``y_t`` keeps its ``density`` share of largest entries. Each output elects the sign of ``sum_t w_t y_t``. The
    update is ``sum_t w_t y_t / sum_t w_t`` over the experts whose entry has that sign. A single expert is only trimmed.

    Args:
        h_TP: ``A x`` of every expert.
        weights_TE: Weight of every expert; zero if it is not chosen.
        B_OP: Output factors of every expert.
        owner_P: The expert of each column of ``B_OP``.
        density: Share of entries that is kept, above 0 and at most 1.

    Source: TIES-Merging (Yadav et al., 2023). As SpectR's section 3.3 allows, it is applied to the experts' updates of
    a token instead of their weights; merging weights for each token would form them in full.
    """
    weights_TE = weights_TE.float()
    updates, weights = [], []
    for expert in range(weights_TE.shape[-1]):
        columns = (owner_P == expert).nonzero().squeeze(1)
        y_TO = linear(h_TP[..., columns], B_OP[:, columns]).float()
        weight_T1 = weights_TE[..., expert, None]
        updates.append(trim(y_TO, density) * weight_T1)
        weights.append(weight_T1)
    return elect_and_mean(updates, weights).to(h_TP.dtype)
