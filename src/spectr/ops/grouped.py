"""Products for the tokens that need them alone: expert by expert, over the tokens that take it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.functional import linear


def grouped_inputs(
    x_TI: Float[Tensor, "*T I"], A_PI: Float[Tensor, "P I"], ranks: Sequence[int], taken_TE: Bool[Tensor, "*T E"]
) -> Float[Tensor, "*T P"]:
    """``A_t x`` of each token's own experts, zero for the others: ``2 R I`` operations for each taken expert."""
    if is_tracing():  # for other inputs, where other tokens use an expert
        return linear(x_TI, A_PI) * _spread(taken_TE, ranks)
    x_NI, taken_NE = x_TI.flatten(0, -2), taken_TE.flatten(0, -2)
    h_NP = x_NI.new_zeros(len(x_NI), len(A_PI))
    start = 0
    for expert, rank in enumerate(ranks):
        rows = taken_NE[:, expert].nonzero().squeeze(1)
        h_NP[rows, start : start + rank] = linear(x_NI[rows], A_PI[start : start + rank])
        start += rank
    return h_NP.reshape(*x_TI.shape[:-1], len(A_PI))


def grouped_outputs(
    h_TP: Float[Tensor, "*T P"], weights_TE: Float[Tensor, "*T E"], B_OP: Float[Tensor, "O P"], ranks: Sequence[int]
) -> Float[Tensor, "*T O"]:
    """``sum_t w_t B_t h_t`` over each token's own experts: ``2 R O`` operations for each expert with a weight."""
    if is_tracing():
        return linear(h_TP * _spread(weights_TE, ranks).to(h_TP), B_OP)
    h_NP, weights_NE = h_TP.flatten(0, -2), weights_TE.flatten(0, -2).to(h_TP.dtype)
    delta_NO = h_NP.new_zeros(len(h_NP), len(B_OP))
    start = 0
    for expert, rank in enumerate(ranks):
        rows = weights_NE[:, expert].nonzero().squeeze(1)
        weighted_NR = h_NP[rows, start : start + rank] * weights_NE[rows, expert, None]
        delta_NO.index_add_(0, rows, linear(weighted_NR, B_OP[:, start : start + rank]))
        start += rank
    return delta_NO.reshape(*h_TP.shape[:-1], len(B_OP))


def _spread(values_TE: Shaped[Tensor, "*T E"], ranks: Sequence[int]) -> Shaped[Tensor, "*T P"]:
    """An expert's number at each of its rows."""
    return values_TE.repeat_interleave(torch.tensor(ranks, device=values_TE.device), dim=-1)
