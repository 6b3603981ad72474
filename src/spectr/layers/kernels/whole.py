"""A routed layer as the compiled functions know it, and the call that does all of it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from spectr.layers.kernels.base import Choice

FEW = 16  # tokens; of more, products by torch are faster


class Layer(ctypes.Structure):
    """``struct layer`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("W", "bias", "A", "Bt", "centers")),
        *((name, ctypes.c_long) for name in ("inputs", "outputs", "rows", "experts", "k")),
        ("temperature", ctypes.c_float),
    )

    @staticmethod
    def of(A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None = None, choice: Choice | None = None) -> Layer:
        """By the places of tensors, which have to be kept."""
        (rows, inputs), outputs = A_PI.shape, Bt_PO.shape[1]
        experts, k, temperature = choice or Choice(1, 1, 0.0)
        places = (None, None, place(A_PI), place(Bt_PO), place(centers_P))
        return Layer(*places, inputs, outputs, rows, experts, k, temperature)


class WholeLayer:
    """A base layer and its experts in one call; see :class:`spectr.layers.kernels.base.Whole`.

    Args:
        base: The base layer.
        kept: The tensors that ``layer`` has the places of.
        layer: Without the base layer, whose weight may be replaced at any time.
        few: ``route`` or ``held``, of at most :data:`FEW` tokens.
        many: Of more, where there is such a function.
    """

    def __init__(self, base: nn.Linear, kept: tuple[Tensor | None, ...], layer: Layer, few: Any, many: Any = None):
        self.base, self.kept, self.layer, self.few, self.many = base, kept, layer, few, many
        self.place, self.inputs, self.outputs = ctypes.addressof(layer), layer.inputs, layer.outputs

    def __call__(self, x: Tensor, rows: Tensor | None) -> Tensor | None:
        """See :class:`spectr.layers.kernels.base.Whole`."""
        base, tokens = self.base, x.numel() // self.inputs
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        assert weight is not None
        watched = base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__
        function = self.few if tokens <= FEW else self.many
        if function is None or watched or not _readable(weight, x) or not (bias is None or _readable(bias, x)):
            return None
        self.layer.W, self.layer.bias = weight.data_ptr(), place(bias)
        out = x.new_empty((*x.shape[:-1], self.outputs))
        count = 1 if rows is None else len(rows)
        call = (self.place, x.data_ptr(), place(rows), out.data_ptr(), tokens, count, torch.get_num_threads())
        return None if function(*call) else out


def place(tensor: Tensor | None) -> int | None:
    """Where its numbers are."""
    return None if tensor is None else tensor.data_ptr()


def _readable(weight: Tensor, x: Tensor) -> bool:
    return weight.dtype == x.dtype and weight.is_cpu and weight.is_contiguous() and type(weight) is nn.Parameter
