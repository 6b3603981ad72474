"""TIES across the chosen experts: trim what each adds, elect signs, average what agrees."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear


def merge_ties(
    h_TP: Float[Tensor, "*T P"],
    weights_TE: Float[Tensor, "*T E"],
    B_OP: Float[Tensor, "O P"],
    owner_P: Int[Tensor, " P"],
    *,
    density: float = 0.2,
) -> Float[Tensor, "*T O"]:
    """TIES of the chosen experts' output vectors ``y_t = B_t h_t``.

    Of each ``y_t`` the ``density`` share of largest entries is kept. For each output the sign of ``sum_t w_t y_t`` is
    elected, and the update is ``sum_t w_t y_t / sum_t w_t`` over the experts whose entry has that sign. One expert
    alone is trimmed and nothing else.

    Args:
        h_TP: ``A x`` of every expert.
        weights_TE: Weight of every expert, zero where it is not chosen.
        B_OP: Output factors of every expert.
        owner_P: Which expert a column of ``B_OP`` belongs to.
        density: Share of entries that is kept, above 0 and at most 1.

    Source: TIES-Merging (Yadav et al., 2023), applied as SpectR's section 3.3 allows, to what each expert adds to a
    token instead of to its weights: merging weights anew for each token would form them in full.
    """
    kept = max(1, math.ceil(density * len(B_OP)))
    votes_TO = merged_TO = total_TO = None
    parts = []
    for expert in range(weights_TE.shape[-1]):
        columns = (owner_P == expert).nonzero().squeeze(1)
        y_TO = linear(h_TP[..., columns], B_OP[:, columns]).float()
        floor_T1 = y_TO.abs().topk(kept, dim=-1).values[..., -1:]
        weight_T1 = weights_TE[..., expert, None].float()
        trimmed_TO = torch.where(y_TO.abs() >= floor_T1, y_TO, 0) * weight_T1
        parts.append((trimmed_TO, weight_T1))
        votes_TO = trimmed_TO if votes_TO is None else votes_TO + trimmed_TO
    assert votes_TO is not None
    elected_TO = votes_TO.sign()
    for trimmed_TO, weight_T1 in parts:
        agrees_TO = (trimmed_TO.sign() == elected_TO) & (trimmed_TO != 0)
        part_TO, share_TO = torch.where(agrees_TO, trimmed_TO, 0), torch.where(agrees_TO, weight_T1, 0)
        merged_TO = part_TO if merged_TO is None else merged_TO + part_TO
        total_TO = share_TO if total_TO is None else total_TO + share_TO
    assert merged_TO is not None
    assert total_TO is not None
    return (merged_TO / torch.where(total_TO > 0, total_TO, 1)).to(h_TP.dtype)
