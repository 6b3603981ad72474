"""On a CPU: all that experts add to a layer as one operation in C, into which graphs do not look."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spectr.combine import get_combination, merge_outputs
from spectr.layers.kernels.packed import Choosing, Module, Packed, packed_works
from spectr.routers.settings import combination_of
from spectr.selection import TopK


def fits(experts: Any) -> bool:
    """Whether a layer can be computed so: experts of one rank that are scored by norms alone; any base layer does."""
    return experts.device.type == "cpu" and _simple(experts) and packed_works(experts.dtype)


def packed_of(experts: Any, A_PI: Tensor, B_SOP: list[Tensor]) -> Packed:
    """A layer's experts for that operation."""
    [group] = experts.groups
    centers = group.centers_SP
    modules = [
        Module(B_OP, None if centers is None else centers[s], experts.places[s][0]) for s, B_OP in enumerate(B_SOP)
    ]
    kept = experts.kept() if experts.record else None
    k = group.select.k
    choosing = Choosing(group.columns_E, experts.granted_TE, k, max(k, group.held), _temperature(group), kept)
    return Packed(A_PI, modules, choosing)


def _simple(experts: Any) -> bool:
    """Whether one set of experts of one rank is scored by norms alone, and the best ones' outputs are added up."""
    if experts.split.by_input or len(experts.groups) != 1:
        return False
    [group] = experts.groups
    router = group.router
    outputs = get_combination(combination_of(router)).merge is merge_outputs
    ours = getattr(router, "by_norms", False) and outputs and isinstance(group.select, TopK)
    return bool(ours and group.common_rank is not None)


def _temperature(group: Any) -> float:
    return group.select.temperature if group.select.weighting == "softmax" else 0.0
