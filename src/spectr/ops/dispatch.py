"""Selects a backend for each layer, with the reason, and keeps the result as the layer's plan.

Plans are made when a model is composed, moved or cast. A forward pass compiles and prepares nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from spectr.ops.backend import Backend, FusedLinear, Selector
from spectr.ops.ways import switched_off, wanted

_BACKENDS = {"cpu": "spectr.ops.cpu", "cuda": "spectr.ops.gpu"}
NOT_PREPARED = "kernels were not prepared for these experts"


class Offer(NamedTuple):
    """A backend, or ``None`` if torch has to do the work, and the reason."""

    backend: Backend | None
    reason: str


class KernelPlan(NamedTuple):
    """How the calls of one routed layer are computed.

    Attributes:
        backend: The kernels that compute them; ``None`` for torch.
        reason: Why this backend was selected.
        Bt_PO: Output factors, transposed, as kernels read them.
        centers_P: Subtracted from ``A x`` before scoring, or ``None``.
        select: How tokens choose; ``None`` for fixed weights.
        linear: One call for base layer and experts, or ``None``.
    """

    backend: Backend | None
    reason: str
    Bt_PO: Tensor
    centers_P: Tensor | None = None
    select: Selector | None = None
    linear: FusedLinear | None = None

    @property
    def summary(self) -> str:
        """A line for reports."""
        return self.reason if self.backend is not None else f"torch: {self.reason}"


_without = ContextVar("without kernels", default=False)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within this context, new plans use no kernels. For comparisons."""
    before = _without.set(True)
    try:
        yield
    finally:
        _without.reset(before)


@lru_cache
def backend_for(device: str) -> Offer:
    """The backend for a type of device. If it cannot run here, the cause is logged once."""
    if switched_off():
        return Offer(None, "SPECTR_KERNELS=0")
    if device not in _BACKENDS:
        return Offer(None, f"no kernels for {device}")
    wanted()  # a wrong setting is an error, not a missing backend
    try:
        backend = import_module(_BACKENDS[device]).available()
    except Exception as error:  # compilers and drivers may raise anything
        report_once(f"routed layers run without kernels for {device}: {error}")
        return Offer(None, str(error))
    return Offer(backend, f"{backend.name} for {device}")


def make_kernel_plan(
    base: nn.Module,
    A_PI: Tensor,
    B_OP: Tensor,
    centers_P: Tensor | None = None,
    select: Selector | None = None,
    refusal: str = "",
) -> KernelPlan:
    """Select a backend for a layer and its experts, and let it compile and time its kernels.

    Args:
        base: The base layer.
        A_PI: Input factors of all experts.
        B_OP: Output factors of all experts; ``B_OP.mT`` is contiguous.
        centers_P: Subtracted from ``A x`` before scoring, or ``None``.
        select: How tokens choose; ``None`` for fixed weights.
        refusal: The reason if no kernel supports this router; empty otherwise.
    """
    Bt_PO = B_OP.mT
    backend, reason = Offer(None, "without kernels") if _without.get() else backend_for(A_PI.device.type)
    if select is not None and backend is not None and select.rule not in backend.rules:
        refusal = f"no kernel scores by the rule '{select.rule}'"
    if backend is not None and not refusal and not backend.know(A_PI, Bt_PO):
        refusal = f"no kernel for these tensors ({str(A_PI.dtype).removeprefix('torch.')}, {A_PI.device.type})"
    if backend is None or refusal:
        return KernelPlan(None, refusal or reason, Bt_PO, centers_P, select)
    linear = backend.fused_linear(base, A_PI, Bt_PO, centers_P, select)
    how = backend.prepare(A_PI, Bt_PO, centers_P, select, linear)
    whole = "with" if linear is not None else f"after {type(base).__name__},"
    work = "fixed weights" if select is None else f"top {select.k} of {select.experts} by {select.rule}"
    why = f"{reason}: {work}, {whole} the base layer{how and '; '}{how}"
    return KernelPlan(backend, why, Bt_PO, centers_P, select, linear)


def update_by_kernels(
    plan: KernelPlan, out: Tensor, x: Tensor, A_PI: Tensor, rows: Tensor | None, *, in_place: bool
) -> Tensor | None:
    """Add the experts' update to the base layer's output by kernels.

    Eager calls go to the backend directly. Graphs without gradients get the registered operation; ``torch.jit.trace``
    gets torch's operations.

    Args:
        plan: The layer's plan.
        out: The base layer's output, (..., O).
        x: The layer's input, (..., I).
        A_PI: Input factors of all experts.
        rows: For a layer that chooses, the prior of shape (B, 1, E), or ``None``; for fixed weights, those weights,
            (B, 1, P). Each row belongs to an equal share of the tokens.
        in_place: Whether ``out`` may be overwritten.

    Returns:
        The sum, or ``None`` if torch has to compute it.
    """
    backend, select = plan.backend, plan.select
    if backend is None or x.dtype != A_PI.dtype or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return None
    if is_compiling():
        return _in_graph(plan, out, x, A_PI, rows, in_place)
    if not backend.take(x, out):
        return None
    if select is None:
        assert rows is not None
        return out if in_place and backend.add_weighted(x, A_PI, plan.Bt_PO, rows, out) else None
    target = out if in_place else out.clone()
    return target if backend.add_chosen(x, A_PI, plan.Bt_PO, plan.centers_P, rows, target, select) else None


def _in_graph(
    plan: KernelPlan, out: Tensor, x: Tensor, A_PI: Tensor, rows: Tensor | None, in_place: bool
) -> Tensor | None:
    if torch.is_grad_enabled() or out.dtype != x.dtype or out.device != x.device:
        return None
    factors, numbers = (A_PI, plan.Bt_PO, plan.centers_P, rows), plan.select or Selector(0, 0, 0.0, "")
    if not in_place:
        return torch.ops.spectr.add_update(out, x, *factors, *numbers)
    torch.ops.spectr.add_update_(out, x, *factors, *numbers)
    return out


@lru_cache(maxsize=256)
def report_once(text: str) -> None:
    """Log a warning once per process."""
    logging.getLogger(__name__).warning(text)
