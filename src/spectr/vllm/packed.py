"""On a CPU, one operation in C for the experts' update of a layer. Graphs do not trace it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spectr.combine import merge_outputs
from spectr.ops.packed import Choice, Choosing, Module, Packed, packed_works
from spectr.routers import LengthRouter
from spectr.selection import Selection, TopK


def fits(experts: Any) -> bool:
    """Whether this operation can compute a layer: its experts need one rank and scores that are norms."""
    return experts.device.type == "cpu" and _simple(experts) and packed_works(experts.dtype)


def packed_of(experts: Any, A_PI: Tensor, B_SOP: list[Tensor]) -> Packed:
    """A layer's experts for this operation."""
    [group] = experts.groups
    tables = group.centers_SWP, group.scales_SWP
    centers, scales = ([None] * len(B_SOP) if table is None else table for table in tables)
    begins = (begin for begin, _ in experts.places)
    modules = [Module(*one) for one in zip(B_SOP, centers, begins, scales, strict=True)]
    kept = experts.kept() if experts.record else None
    choices = [_choice(select, group.experts) for select in group.selects]
    routers = experts.router_T if len(choices) > 1 else None
    most = max(group.most_fixed, *(choice.k for choice in choices), 1)
    return Packed(A_PI, modules, Choosing(group.columns_E, experts.routing_TE, choices, routers, most, kept))


def _simple(experts: Any) -> bool:
    """Whether one set of experts of one rank has norms as scores, and the best experts' outputs are added."""
    if experts.split.by_input or len(experts.groups) != 1:
        return False
    [group] = experts.groups
    outputs = group.router.combination.merge is merge_outputs
    return bool(outputs and isinstance(group.router, LengthRouter) and group.common_rank is not None)


def _choice(select: Selection, experts: int) -> Choice:
    if not isinstance(select, TopK):
        return Choice(experts, 0.0)
    return Choice(select.k, select.temperature if select.weighting == "softmax" else 0.0)
