"""The interface of a backend: kernels for one kind of device.

Legend: T tokens, I inputs, O outputs, E experts, R the rank of each expert, P = E R, B rows; each row of a prior or of
weights belongs to an equal share of the tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import (
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,  # pyright: ignore[reportAttributeAccessIssue]
)


class Selector(NamedTuple):
    """How a token chooses among experts.

    Attributes:
        experts: Number of experts; all have the same rank.
        k: Number of experts that a token takes.
        temperature: Of the softmax over the chosen experts' scores; 0 gives each the weight ``1 / k``.
        rule: Name of the scoring rule, a key of :data:`spectr.ops.rules.RULES`.
    """

    experts: int
    k: int
    temperature: float
    rule: str = "lengths"


@runtime_checkable
class FusedLinear(Protocol):
    """Computes a plain linear layer and its experts in one call."""

    def __call__(self, x: Tensor, rows: Tensor | None) -> Tensor | None:
        """The routed layer's output, (..., O).

        Args:
            x: Tokens, (..., I), of any dtype and device.
            rows: For a layer that chooses, the prior of shape (B, 1, E), or ``None``; for fixed weights, those weights,
                (B, 1, P).

        Returns:
            The output, or ``None`` if base layer and update have to be computed separately for this call.
        """
        ...


class Backend(ABC):
    """The kernels for one kind of device.

    Attributes:
        name: Shown in reports.
        device: The type of device, such as ``cpu``.
        dtypes: Supported dtypes.
        rules: Names of the supported scoring rules.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    rules: tuple[str, ...] = ("lengths",)

    def take(self, *tensors: Tensor) -> bool:
        """Whether the kernels support these tensors, and operations are not :func:`watched`."""
        return not watched() and self.know(*tensors)

    def know(self, *tensors: Tensor) -> bool:
        """Whether these are plain tensors of one supported dtype, contiguous, on the device, and not empty."""
        dtype, device = tensors[0].dtype, self.device
        if dtype not in self.dtypes:
            return False
        for t in tensors:
            if type(t) is not Tensor or t.dtype != dtype or t.device.type != device or not t.is_contiguous():
                return False
            if not t.numel():
                return False
        return True

    def prepare(
        self, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, select: Selector | None, linear: FusedLinear | None
    ) -> str:
        """Compile and time the kernels for calls of this form, so that no call has to.

        Args:
            A_PI: See :meth:`fused_linear`.
            Bt_PO: See :meth:`fused_linear`.
            centers_P: See :meth:`fused_linear`.
            select: See :meth:`fused_linear`.
            linear: The result of :meth:`fused_linear`.

        Returns:
            A description of how calls are computed, for reports; may be empty.
        """
        return ""

    @abstractmethod
    def choose(self, h_TP: Tensor, centers_P: Tensor | None, prior_BE: Tensor | None, select: Selector) -> bool:
        """Overwrite ``h`` with ``w_t h_t`` for the chosen experts and with zero for the others.

        Args:
            h_TP: ``A x`` for all experts, (..., P), contiguous.
            centers_P: Subtracted from ``h`` before scoring, or ``None``.
            prior_BE: Multiplied with the scores, float32, or ``None``.
            select: How each token chooses.

        Returns:
            Whether it was done; if not, ``h`` is unchanged.
        """

    @abstractmethod
    def add_chosen(
        self,
        x: Tensor,
        A_PI: Tensor,
        Bt_PO: Tensor,
        centers_P: Tensor | None,
        prior_BE: Tensor | None,
        out: Tensor,
        select: Selector,
    ) -> bool:
        """Add ``sum_t w_t B_t A_t x`` to ``out``, for the experts with the largest ``||A_t x - center_t||``.

        Args:
            x: Tokens, (..., I), contiguous. All tensors but the prior have one dtype, and all one device.
            A_PI: Input factors of all experts, contiguous.
            Bt_PO: Output factors of all experts, transposed, contiguous.
            centers_P: See :meth:`choose`.
            prior_BE: See :meth:`choose`.
            out: The base layer's output, (..., O), contiguous; changed in place.
            select: See :meth:`choose`.

        Returns:
            Whether it was done; if not, ``out`` is unchanged.
        """

    def add_weighted(self, x: Tensor, A_PI: Tensor, Bt_PO: Tensor, weights_BP: Tensor, out: Tensor) -> bool:
        """Add ``B (w A x)`` with the given weights to ``out``; otherwise as :meth:`add_chosen`."""
        return False

    def fused_linear(
        self, base: nn.Module, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, select: Selector | None
    ) -> FusedLinear | None:
        """Combine a base layer and its experts into one call.

        Args:
            base: The base layer.
            A_PI: Input factors; :meth:`know` is true of this tensor and the next.
            Bt_PO: Output factors, transposed.
            centers_P: Subtracted from ``A x`` before scoring, or ``None``.
            select: How tokens choose; ``None`` for fixed weights.

        Returns:
            The call, or ``None`` if the backend has none for such a layer.
        """
        return None


def watched() -> bool:
    """Whether autograd or a mode of torch (such as a counter) records single operations, or autocast changes dtypes."""
    return is_grad_enabled() or _len_torch_dispatch_stack() > 0 or _is_any_autocast_enabled()


def own_numbers(base: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a base layer whose forward is ``x @ weight.T + bias`` and nothing else.

    Returns:
        ``None`` if the layer has hooks, or if a parameter is quantised, sharded, or differs from ``x`` in dtype or
        device.
    """
    own = base.__dict__  # a module's own look-up of an attribute costs more
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return None
    weight, bias = own["_parameters"]["weight"], own["_parameters"]["bias"]
    return (weight, bias) if _alike(weight, x) and (bias is None or _alike(bias, x)) else None


def _alike(number: Tensor | None, x: Tensor) -> bool:
    if type(number) is not nn.Parameter or number.dtype is not x.dtype or not number.is_contiguous():
        return False
    return number.is_cpu if x.is_cpu else number.device == x.device
