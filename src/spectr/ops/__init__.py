"""What a routed layer adds to its base layer's output, as operations on tensors and numbers.

``choose`` makes ``w_t h_t`` of ``h = A x``; ``add_update`` adds the chosen experts' outputs to the base layer's. Each
has a plain reference (:mod:`spectr.ops.reference`), torch's computation, and kernels: C for CPUs, compiled by the
compiler that is there and kept in the cache folder, and Triton for GPUs. :mod:`spectr.ops.dispatch` says which of them
serves a layer, and why. Graphs see the operations of :mod:`spectr.ops.registered`.
"""

from spectr.ops.base import Backend, Choice, FusedLinear
from spectr.ops.dispatch import (
    NOT_PREPARED,
    Offer,
    Plan,
    backend_for,
    make_plan,
    report_once,
    update_by_kernels,
    without_kernels,
)
from spectr.ops.registered import add_update, add_update_, choose

__all__ = [
    "NOT_PREPARED",
    "Backend",
    "Choice",
    "FusedLinear",
    "Offer",
    "Plan",
    "add_update",
    "add_update_",
    "backend_for",
    "choose",
    "make_plan",
    "report_once",
    "update_by_kernels",
    "without_kernels",
]
