"""Adding the chosen experts' outputs to a base layer's: the same sum as :func:`spectr.combine.merge_outputs`, faster.

Two ways, and a rule that chooses. *Masked*: all experts' ``h`` times their weights, zero for most, in one product:
``2 P O`` operations a token. *Gathered*: the chosen experts' rows of the output factor alone: ``2 k R O``, each about
three times as expensive on a CPU without matrix units.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from spectr.selection import Selection, TopK

_GATHERED_OVER_MASKED = 4  # cost of an operation, with a margin for gathering


def gathering_pays(select: Selection, experts: int, common_rank: int | None) -> bool:
    """Whether gathering is cheaper; it needs a fixed number of chosen experts, of one rank."""
    return isinstance(select, TopK) and common_rank is not None and experts >= _GATHERED_OVER_MASKED * select.k


def weighted(
    h_TP: Float[Tensor, "*T P"],
    weights_TE: Float[Tensor, "*T E"],
    common_rank: int | None,
    member_EP: Float[Tensor, "E P"] | None = None,
) -> Float[Tensor, "*T P"]:
    """``w_t h_t`` of every expert; of experts whose ranks differ, which are whose comes from ``member_EP``."""
    weights_TE = weights_TE.to(h_TP.dtype)
    if common_rank is None:
        assert member_EP is not None
        return h_TP * (weights_TE @ member_EP)
    return (h_TP.unflatten(-1, (-1, common_rank)) * weights_TE[..., None]).flatten(-2)


def add_masked(
    out_TO: Float[Tensor, "*T O"], weighted_TP: Float[Tensor, "*T P"], B_OP: Float[Tensor, "O P"], *, in_place: bool
) -> Float[Tensor, "*T O"]:
    """``out + B (w h)``, in the memory of ``out`` where that may be.

    Args:
        out_TO: The base layer's output, of the dtype and on the device of the others.
        weighted_TP: ``w_t h_t`` of every expert, zero where it is not chosen.
        B_OP: Output factors of every expert.
        in_place: Whether ``out`` may be overwritten.
    """
    out_NO, weighted_NP = _flat(out_TO), _flat(weighted_TP)
    if in_place:
        out_NO.addmm_(weighted_NP, B_OP.mT)
        return out_TO
    return torch.addmm(out_NO, weighted_NP, B_OP.mT).reshape(out_TO.shape)


def gathered_sum(
    h_TP: Float[Tensor, "*T P"],
    index_TK: Int[Tensor, "*T K"],
    weights_TK: Float[Tensor, "*T K"],
    B_OP: Float[Tensor, "O P"],
    rows_ER: Int[Tensor, "E R"],
) -> Float[Tensor, "*T O"]:
    """``sum_k w_k B_k h_k`` from the chosen experts' rows alone.

    Args:
        h_TP: ``A x`` of every expert, all of one rank.
        index_TK: The chosen experts.
        weights_TK: Their weights.
        B_OP: Output factors; fast where ``B_OP.mT`` is contiguous.
        rows_ER: Each expert's places along P.
    """
    h_NP, weights_NK = _flat(h_TP), _flat(weights_TK.to(h_TP.dtype))
    k, rank = index_TK.shape[-1], rows_ER.shape[1]
    rows_NP = rows_ER.index_select(0, index_TK.flatten()).view(len(h_NP), k * rank)
    taken_NKR = h_NP.gather(-1, rows_NP).view(*weights_NK.shape, rank)
    shares_NP = (taken_NKR * weights_NK[..., None]).view(len(h_NP), k * rank)
    sums_NO = picked_sum(rows_NP, shares_NP, B_OP)
    return sums_NO.view(*h_TP.shape[:-1], sums_NO.shape[-1])


def picked_sum(
    rows_NP: Int[Tensor, "N KR"], shares_NP: Float[Tensor, "N KR"], B_OP: Float[Tensor, "O P"]
) -> Float[Tensor, "N O"]:
    """The sum of these rows of the output factor, each as much as its share."""
    return embedding_bag(rows_NP, B_OP.mT, per_sample_weights=shares_NP, mode="sum")


def _flat(tensor: Tensor) -> Tensor:
    """All leading axes as one; of one token alone, a first axis of one."""
    return tensor[None] if tensor.ndim == 1 else tensor.flatten(0, -2)
