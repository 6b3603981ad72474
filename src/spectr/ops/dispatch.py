"""Which backend does an operation, why, and the plan that a layer's calls go by.

A plan is made when a model is composed, moved or cast. Calls compile and prepare nothing.
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

from spectr.ops.base import Backend, Choice, FusedLinear
from spectr.ops.ways import switched_off, wanted

_BACKENDS = {"cpu": "spectr.ops.cpu", "cuda": "spectr.ops.gpu"}
NOT_PREPARED = "kernels were not prepared for these experts"


class Offer(NamedTuple):
    """A backend, or ``None``, and why."""

    backend: Backend | None
    reason: str


class Plan(NamedTuple):
    """How calls of a layer with some experts are computed.

    Attributes:
        backend: Whose kernels do it; ``None``: torch.
        reason: Why that one.
        Bt_PO: Output factors as kernels read them.
        centers_P: Subtracted before scoring.
        choice: How tokens choose; ``None`` where their weights are fixed.
        linear: The base layer and its experts in one call, where there is one.
    """

    backend: Backend | None
    reason: str
    Bt_PO: Tensor
    centers_P: Tensor | None = None
    choice: Choice | None = None
    linear: FusedLinear | None = None

    @property
    def summary(self) -> str:
        """A line for reports."""
        return self.reason if self.backend is not None else f"torch: {self.reason}"


_without = ContextVar("without kernels", default=False)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Plans that are made inside use no kernels, for comparisons."""
    before = _without.set(True)
    try:
        yield
    finally:
        _without.reset(before)


@lru_cache
def backend_for(device: str) -> Offer:
    """The backend for a kind of device. One that cannot run is reported once."""
    if switched_off():
        return Offer(None, "SPECTR_KERNELS=0")
    if device not in _BACKENDS:
        return Offer(None, f"no kernels for {device}")
    wanted()  # a wrong wish is an error, not a missing backend
    try:
        backend = import_module(_BACKENDS[device]).available()
    except Exception as error:  # compilers and drivers raise whatever they like
        report_once(f"routed layers run without kernels for {device}: {error}")
        return Offer(None, str(error))
    return Offer(backend, f"{backend.name} for {device}")


def make_plan(
    base: nn.Module,
    A_PI: Tensor,
    B_OP: Tensor,
    centers_P: Tensor | None = None,
    choice: Choice | None = None,
    refusal: str = "",
) -> Plan:
    """Choose a backend for a layer and its experts, and have it prepare what it needs.

    Args:
        base: The base layer.
        A_PI: Input factors.
        B_OP: Output factors; ``B_OP.mT`` is contiguous.
        centers_P: Subtracted before scoring.
        choice: How tokens choose; ``None`` where their weights are fixed.
        refusal: Why no kernel computes what the router wants, if none does.
    """
    Bt_PO = B_OP.mT
    backend, reason = Offer(None, "without kernels") if _without.get() else backend_for(A_PI.device.type)
    if choice is not None and backend is not None and choice.rule not in backend.rules:
        refusal = f"no kernel scores by the rule '{choice.rule}'"
    if backend is not None and not refusal and not backend.know(A_PI, Bt_PO):
        refusal = f"no kernel for these tensors ({str(A_PI.dtype).removeprefix('torch.')}, {A_PI.device.type})"
    if backend is None or refusal:
        return Plan(None, refusal or reason, Bt_PO, centers_P, choice)
    linear = backend.fused_linear(base, A_PI, Bt_PO, centers_P, choice)
    how = backend.prepare(A_PI, Bt_PO, centers_P, choice, linear)
    whole = "with" if linear is not None else f"after {type(base).__name__},"
    work = "fixed weights" if choice is None else f"top {choice.k} of {choice.experts} by {choice.rule}"
    why = f"{reason}: {work}, {whole} the base layer{how and '; '}{how}"
    return Plan(backend, why, Bt_PO, centers_P, choice, linear)


def update_by_kernels(
    plan: Plan, out: Tensor, x: Tensor, A_PI: Tensor, rows: Tensor | None, *, in_place: bool
) -> Tensor | None:
    """The base layer's output with its experts' update, by kernels; ``None`` where this call is torch's.

    Eager code calls the backend itself. A graph that needs no gradients gets the registered operation, except of
    ``torch.jit.trace``, which gets torch's.

    Args:
        plan: Of the layer.
        out: The base layer's output, (..., O).
        x: Its input, (..., I).
        A_PI: Input factors.
        rows: Of a layer that routes the prior, (B, 1, E), if there is one; else the fixed weights, (B, 1, P). A row for
            each equal share of the tokens.
        in_place: Whether the result may be in the memory of ``out``.
    """
    backend, choice = plan.backend, plan.choice
    if backend is None or x.dtype != A_PI.dtype or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return None
    if is_compiling():
        return _in_graph(plan, out, x, A_PI, rows, in_place)
    if not backend.take(x, out):
        return None
    if choice is None:
        assert rows is not None
        return out if in_place and backend.add_weighted(x, A_PI, plan.Bt_PO, rows, out) else None
    target = out if in_place else out.clone()
    return target if backend.add_chosen(x, A_PI, plan.Bt_PO, plan.centers_P, rows, target, choice) else None


def _in_graph(plan: Plan, out: Tensor, x: Tensor, A_PI: Tensor, rows: Tensor | None, in_place: bool) -> Tensor | None:
    if torch.is_grad_enabled() or out.dtype != x.dtype or out.device != x.device:
        return None
    factors, numbers = (A_PI, plan.Bt_PO, plan.centers_P, rows), plan.choice or Choice(0, 0, 0.0, "")
    if not in_place:
        return torch.ops.spectr.add_update(out, x, *factors, *numbers)
    torch.ops.spectr.add_update_(out, x, *factors, *numbers)
    return out


@lru_cache(maxsize=256)
def report_once(text: str) -> None:
    """Write a line to the log, the first time."""
    logging.getLogger(__name__).warning(text)
