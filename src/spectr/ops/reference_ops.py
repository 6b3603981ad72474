"""What the operations compute, in plain form. Every backend is tested against these.

Legend: T tokens, I inputs, O outputs, E experts, R the rank of each, P = E R, B rows that share the tokens equally.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.ops.backend import Selector
from spectr.ops.packed import Choosing, Module
from spectr.selection import TopK, select_among


def choose(
    h_TP: Float[Tensor, "T P"],
    centers_P: Float[Tensor, " P"] | None,
    prior_BE: Float[Tensor, "B E"] | None,
    select: Selector,
) -> Float[Tensor, "T P"]:
    """``w_t h_t`` of each token's ``k`` best experts by ``||h_t - center_t||``, zero for the others.

    Of experts with equal scores the first is better. See :func:`spectr.ops.choose` for the arguments.
    """
    tokens, weighted_TP = len(h_TP), torch.zeros_like(h_TP)
    for token, h_P in enumerate(h_TP):
        scored_P = h_P if centers_P is None else h_P - centers_P
        scores = [float(part_R.float().norm()) for part_R in scored_P.view(select.experts, -1)]
        if prior_BE is not None:
            prior_E = prior_BE[token * len(prior_BE) // tokens]
            scores = [score * float(prior) for score, prior in zip(scores, prior_E, strict=True)]
        best = sorted(range(select.experts), key=lambda expert: -scores[expert])[: select.k]  # sorting is stable
        weights = torch.full((len(best),), 1 / len(best), dtype=torch.float32)
        if select.temperature:
            weights = torch.tensor(
                [scores[expert] / select.temperature for expert in best], dtype=torch.float32
            ).softmax(0)
        parts_ER, to_ER = h_P.view(select.experts, -1), weighted_TP[token].view(select.experts, -1)
        for expert, weight in zip(best, weights, strict=True):
            to_ER[expert] = (weight * parts_ER[expert].float()).to(h_P.dtype)
    return weighted_TP


def add_update(
    out_TO: Float[Tensor, "T O"],
    x_TI: Float[Tensor, "T I"],
    A_PI: Float[Tensor, "P I"],
    Bt_PO: Float[Tensor, "P O"],
    centers_P: Float[Tensor, " P"] | None,
    rows: Float[Tensor, "B N"] | None,
    select: Selector | None,
) -> Float[Tensor, "T O"]:
    """``out + sum_t w_t B_t A_t x``, with weights that are chosen, or the fixed ones in ``rows``.

    See :func:`spectr.ops.add_update` for the arguments.
    """
    h_TP = x_TI @ A_PI.mT
    if select is not None:
        return out_TO + choose(h_TP, centers_P, rows, select) @ Bt_PO
    assert rows is not None
    weights_TP = torch.stack([rows[token * len(rows) // len(h_TP)] for token in range(len(h_TP))])
    return out_TO + (weights_TP * h_TP) @ Bt_PO


def add_packed(
    out_TO: Float[Tensor, "T O"],
    x_TI: Float[Tensor, "T I"],
    A_PI: Float[Tensor, "P I"],
    modules: Sequence[Module],
    choosing: Choosing,
) -> tuple[Float[Tensor, "T S E"], Float[Tensor, "T S E"], Float[Tensor, "T O"]]:
    """The scores, the weights and the output of :class:`spectr.ops.packed.Packed`, the last in float64."""
    tokens, experts = len(x_TI), len(choosing.columns_E)
    granted_TE = choosing.granted_TF[:tokens, choosing.columns_E]
    router_T = torch.zeros(tokens) if choosing.router_T is None else choosing.router_T[:tokens]
    sums_TO, found = out_TO.double(), []
    for module, A in zip(modules, A_PI.split([module.B_OP.shape[1] for module in modules]), strict=True):
        h_TER = (x_TI.double() @ A.double().mT).view(tokens, experts, -1)
        scores_TE, weights_TE = (torch.zeros(tokens, experts, dtype=torch.float32) for _ in range(2))
        for router, select in enumerate(choosing.selects):
            own = router_T == router
            scored = h_TER[own] if module.scales_WP is None else h_TER[own] * module.scales_WP[router].view(experts, -1)
            if module.centers_WP is not None:
                scored = scored - module.centers_WP[router].view(experts, -1)
            granted = granted_TE[own]
            scores_TE[own] = scored.norm(dim=-1).float() * granted.where(granted >= 0, 1)
            weighting = "softmax" if select.temperature else "uniform"
            chosen = TopK(k=select.k, weighting=weighting, temperature=select.temperature or 1.0)
            weights_TE[own] = select_among(chosen, scores_TE[own], granted >= 0)
        weights_TE = (-granted_TE).where(granted_TE < 0, weights_TE)
        update_TO = (h_TER * weights_TE[..., None]).flatten(-2) @ module.B_OP.double().mT
        sums_TO[:, module.begin : module.begin + len(module.B_OP)] += update_TO
        found.append((scores_TE, weights_TE))
    scores_S, weights_S = zip(*found, strict=True)
    return torch.stack(scores_S, 1), torch.stack(weights_S, 1), sums_TO
