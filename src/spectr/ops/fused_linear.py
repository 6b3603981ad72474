"""A routed layer as the C functions know it, and the one call for a plain linear layer and its experts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, get_num_threads, nn

from spectr.ops import screening
from spectr.ops.base import Choice, own_numbers, watched

_ONE = Choice(1, 1, 0.0)


class Layer(ctypes.Structure):
    """``struct layer`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("W", "bias", "A", "Bt", "centers", "rough", "errors", "sizes")),
        *((name, ctypes.c_long) for name in ("inputs", "outputs", "rows", "experts", "k", "stride")),
        ("temperature", ctypes.c_float),
    )

    @staticmethod
    def of(A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None = None, choice: Choice | None = None) -> Layer:
        """By the places of tensors, which have to be kept."""
        (rows, inputs), outputs = A_PI.shape, Bt_PO.shape[1]
        experts, k, temperature, _ = choice or _ONE
        places = (None, None, place(A_PI), place(Bt_PO), place(centers_P))
        return Layer(*places, None, None, None, inputs, outputs, rows, experts, k, outputs, temperature)


class Calls(NamedTuple):
    """What does the same for few tokens and for many.

    Attributes:
        few: Reads each weight once, and multiplies it with each token.
        most: Tokens that are few.
        many: By the machine's own units for products, where it has any.
    """

    few: Callable[..., int]
    most: int
    many: Callable[..., int] | None

    def of(self, tokens: int) -> Callable[..., int] | None:
        """The one for this number of tokens."""
        return self.few if tokens <= self.most else self.many


class FusedCpuLinear:
    """A :class:`spectr.ops.base.FusedLinear`.

    Args:
        base: The base layer.
        kept: The tensors that ``layer`` has the places of.
        layer: Without the base layer, whose weight may be replaced at any time.
        calls: ``route`` or ``held``, of few tokens and of many.
    """

    rough: screening.Rough | None = None

    def __init__(self, base: nn.Linear, kept: tuple[Tensor, Tensor, Tensor | None], layer: Layer, calls: Calls):
        self.base, self.kept, self.layer, self.calls, self.dtype = base, kept, layer, calls, kept[0].dtype
        self.place, self.inputs, self.outputs = ctypes.addressof(layer), layer.inputs, layer.outputs
        if self.dtype is torch.float32 and layer.experts >= screening.PAYS * layer.k:
            self.rough = rough = screening.Rough.of(kept[0], layer.experts)
            if rough is not None:
                layer.rough, layer.errors, layer.sizes = place(rough.A_PI), place(rough.errors_E), place(rough.sizes_E)

    def __call__(self, x: Tensor, rows: Tensor | None) -> Tensor | None:
        """See :class:`spectr.ops.base.FusedLinear`."""
        if type(x) is not Tensor or x.dtype is not self.dtype or not x.is_cpu or not x.is_contiguous() or watched():
            return None
        if x.shape[-1] != self.inputs or not x.numel():
            return None
        tokens, numbers = x.numel() // self.inputs, own_numbers(self.base, x)
        function = self.calls.of(tokens)
        if function is None or numbers is None:
            return None
        if self.rough is not None and self.rough.version != self.kept[0]._version:
            self.rough = self.layer.rough = None  # A was changed in place: all of it is read until it is prepared again
        self.layer.W, self.layer.bias = place(numbers[0]), place(numbers[1])
        out = x.new_empty((*x.shape[:-1], self.outputs))
        count = 1 if rows is None else len(rows)
        failed = function(self.place, place(x), place(rows), place(out), tokens, count, get_num_threads())
        return None if failed else out


def place(tensor: Tensor | None) -> int | None:
    """Where its numbers are."""
    return None if tensor is None else tensor.data_ptr()
