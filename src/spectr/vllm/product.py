"""Products with small constant matrices, as fast as the machine allows. The matrices can be replaced in place."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear


class Product(nn.Module):
    """``x @ weight^T``. On a CPU, oneDNN keeps the weight in its own order, and the plain copy is freed.

    Args:
        weight_NK: The weight, on its device and in the dtype of the computation.
    """

    weight_NK: Tensor
    packed: Any = None
    multiply: Any = None

    def __init__(self, weight_NK: Float[Tensor, "N K"]):
        super().__init__()
        self.size = tuple(weight_NK.shape)
        self.register_buffer("weight_NK", weight_NK.contiguous(), persistent=False)
        if weight_NK.device.type == "cpu" and weight_NK.numel():
            self.packed = _pack(self.weight_NK)
            self.multiply = getattr(_ops(), "onednn_mm", None)
            if self.packed is not None:
                self.weight_NK = weight_NK.new_empty(0)

    def forward(self, x_TK: Float[Tensor, "*T K"]) -> Float[Tensor, "*T N"]:
        """The product."""
        return linear(x_TK, self.weight_NK) if self.packed is None else self.multiply(self.packed, x_TK, None)

    def replace(self, weight_NK: Float[Tensor, "N K"]) -> None:
        """Replace the weight by one of the same size, from the next call on. Compiled graphs use it too."""
        assert tuple(weight_NK.shape) == self.size
        if self.packed is None:
            self.weight_NK.copy_(weight_NK)
            return
        fresh = _pack(weight_NK.to(self.weight_NK.dtype).contiguous())
        old, new = self.packed.handler_tensor, fresh.handler_tensor
        address = old.item()
        old.copy_(new)
        new.fill_(address)  # so that what goes with `fresh` are the old weight's own bytes


def _pack(weight_NK: Tensor) -> Any:
    ops = _ops()
    if not getattr(ops, "_supports_onednn", False):
        return None
    try:
        return ops.create_onednn_mm(weight_NK.t(), 32)
    except RuntimeError:  # a dtype or size that oneDNN does not support
        return None


@cache
def _ops() -> Any:
    return import_module("vllm._custom_ops")
