"""The update that experts add to a linear layer's output, as operations on tensors.

``choose`` turns ``h = A x`` into ``w_t h_t``: weighted for the chosen experts, zero for the others. ``add_update`` adds
``sum_t w_t B_t h_t`` to the base layer's output. Each operation has a plain reference
(:mod:`spectr.ops.reference_ops`), an implementation in torch, and kernels: C for CPUs, compiled on this machine and
kept in the cache folder, and Triton for GPUs. :mod:`spectr.ops.dispatch` selects one for each layer and gives the
reason. Compiled graphs call the operations of :mod:`spectr.ops.registered`.
"""

from spectr.lazy import lazy
from spectr.ops.backend import Backend, FusedLinear, Selector
from spectr.ops.dispatch import (
    NOT_PREPARED,
    KernelPlan,
    Offer,
    backend_for,
    make_kernel_plan,
    report_once,
    update_by_kernels,
    without_kernels,
)
from spectr.ops.registered import add_update, add_update_, choose

__all__ = [
    "NOT_PREPARED",
    "Backend",
    "FusedLinear",
    "KernelPlan",
    "Offer",
    "Selector",
    "add_update",
    "add_update_",
    "backend_for",
    "choose",
    "make_kernel_plan",
    "report_once",
    "update_by_kernels",
    "without_kernels",
]
__getattr__ = lazy(__name__, {}, renamed={"Choice": "Selector", "Kernels": "Backend", "Whole": "FusedLinear"})
