"""What the operations need of a backend, whatever machine it is for.

Legend: T tokens, I inputs, O outputs, E experts, R the rank of each, P = E R, B rows that share the tokens equally.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _len_torch_dispatch_stack  # pyright: ignore[reportAttributeAccessIssue]


class Choice(NamedTuple):
    """How a token chooses among experts.

    Attributes:
        experts: How many there are; all of one rank.
        k: How many are taken.
        temperature: Of the softmax over their scores; 0 weighs them alike.
        rule: Name of the rule that scores them, of :data:`spectr.ops.rules.RULES`.
    """

    experts: int
    k: int
    temperature: float
    rule: str = "lengths"


@runtime_checkable
class FusedLinear(Protocol):
    """A plain linear layer and its experts in one call."""

    def __call__(self, x: Tensor, rows: Tensor | None) -> Tensor | None:
        """The routed layer's output; ``None`` where this call has to be made in parts.

        Args:
            x: Tokens, of any kind.
            rows: Of a layer that routes the prior, (B, 1, E), if there is one; else the fixed weights, (B, 1, P). A
                row for each equal share of the tokens.
        """
        ...


class Backend(ABC):
    """Kernels that do the work of many of torch's calls.

    Attributes:
        name: As reports show it.
        device: The kind of device whose tensors they take.
        dtypes: The dtypes that they take.
        rules: Names of the rules that they score by.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    rules: tuple[str, ...] = ("lengths",)

    def take(self, *tensors: Tensor) -> bool:
        """Whether they can work on these, and nobody has to see single operations (autograd, a counter)."""
        return not watched() and self.know(*tensors)

    def know(self, *tensors: Tensor) -> bool:
        """Whether these are of one dtype that they take, contiguous, on their device, and not empty."""
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
        self, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, choice: Choice | None, linear: FusedLinear | None
    ) -> str:
        """Compile and time what calls of this form need, so that none has to.

        Args:
            A_PI: See :meth:`fused_linear`.
            Bt_PO: See :meth:`fused_linear`.
            centers_P: See :meth:`fused_linear`.
            choice: See :meth:`fused_linear`.
            linear: What :meth:`fused_linear` gave.

        Returns:
            How calls are computed, for reports; may be empty.
        """
        return ""

    @abstractmethod
    def choose(self, h_TP: Tensor, centers_P: Tensor | None, prior_BE: Tensor | None, choice: Choice) -> bool:
        """In the memory of ``h``: ``w_t h_t`` of the chosen experts, zero for the others.

        Args:
            h_TP: ``A x`` of every expert, (..., P), contiguous.
            centers_P: Subtracted before scoring.
            prior_BE: Multiplied with the scores, float32; a row for each equal share of the tokens.
            choice: Among how many, how many, and their weights.

        Returns:
            Whether it was done; if not, ``h`` is as it was.
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
        choice: Choice,
    ) -> bool:
        """Add the chosen experts' outputs to ``out``: those with the largest ``||A_t x - center_t||``.

        Args:
            x: Tokens, (..., I), contiguous, in the dtype and on the device of all the others.
            A_PI: Input factors of all experts, contiguous.
            Bt_PO: Output factors, transposed, contiguous.
            centers_P: See :meth:`choose`.
            prior_BE: See :meth:`choose`.
            out: (..., O), contiguous.
            choice: See :meth:`choose`.

        Returns:
            Whether it was done; if not, ``out`` is as it was.
        """

    def add_weighted(self, x: Tensor, A_PI: Tensor, Bt_PO: Tensor, weights_BP: Tensor, out: Tensor) -> bool:
        """Add ``B (w A x)`` to ``out``, as :meth:`add_chosen`; a row of weights for each equal share of the tokens."""
        return False

    def fused_linear(
        self, base: nn.Module, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, choice: Choice | None
    ) -> FusedLinear | None:
        """One call for a base layer and its experts, where there is one for such a layer.

        Args:
            base: The base layer.
            A_PI: Input factors, which the backend knows, as the next two.
            Bt_PO: Output factors, transposed.
            centers_P: Subtracted before scoring.
            choice: Of a layer that routes; ``None`` of one whose weights are fixed.
        """
        return None


def watched() -> bool:
    """Whether somebody has to see single operations: autograd, a counter."""
    return is_grad_enabled() or _len_torch_dispatch_stack() > 0


def own_numbers(base: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """The weight and the bias of a base layer that does nothing but a product with them, as plain as these tokens are.

    ``None`` where the layer has hooks, or its numbers are quantised, sharded, or elsewhere.
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
