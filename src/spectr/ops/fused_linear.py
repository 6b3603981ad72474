"""A routed layer as the C functions know it, and the one call for a plain linear layer and its experts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, get_num_threads, nn

from spectr.ops import screening
from spectr.ops.backend import Selector, own_numbers, watched
from spectr.ops.ways import place_of

_ONE = Selector(1, 1, 0.0)


class Layer(ctypes.Structure):
    """``struct layer`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("W", "bias", "A", "Bt", "centers", "rough", "errors", "sizes")),
        *((name, ctypes.c_long) for name in ("inputs", "outputs", "rows", "experts", "k", "stride")),
        ("temperature", ctypes.c_float),
    )

    @staticmethod
    def of(A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None = None, select: Selector | None = None) -> Layer:
        """By the places of tensors, which have to be kept."""
        (rows, inputs), outputs = A_PI.shape, Bt_PO.shape[1]
        experts, k, temperature, _ = select or _ONE
        places = (None, None, place(A_PI), place(Bt_PO), place(centers_P))
        return Layer(*places, None, None, None, inputs, outputs, rows, experts, k, outputs, temperature)


class Experts(NamedTuple):
    """The experts of a layer, as calls read them.

    Attributes:
        layer: Their places.
        A_PI: Input factors.
        Bt_PO: Output factors, transposed.
        centers_P: Subtracted before scoring.
    """

    layer: Layer
    A_PI: Tensor
    Bt_PO: Tensor
    centers_P: Tensor | None


class Way(NamedTuple):
    """How a layer is computed for some numbers of tokens.

    Attributes:
        whole: Does all of it in C, if it does; given places, as ``route`` of the source.
        base: Computes the base layer, given tokens, weight and bias, if that is not done in C,
        add: and then this adds to its output, given experts, tokens, prior or weights, and that output. It returns
            whether that was done.
    """

    whole: Callable[..., int] | None = None
    base: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    add: Callable[[Experts, Tensor, Tensor | None, Tensor], bool] | None = None


class FusedCpuLinear:
    """A :class:`spectr.ops.backend.FusedLinear`.

    Args:
        base: The base layer, whose weight may be replaced at any time.
        experts: Its experts.
        ways: For each of :data:`spectr.ops.ways.TOKENS`; ``None`` where the call is torch's.
    """

    rough: screening.Rough | None = None

    def __init__(self, base: nn.Linear, experts: Experts, ways: Sequence[Way | None]):
        self.base, self.experts, self.ways, self.dtype = base, experts, ways, experts.A_PI.dtype
        self.layer = layer = Layer.from_buffer_copy(experts.layer)
        self.place, self.inputs, self.outputs = ctypes.addressof(layer), layer.inputs, layer.outputs
        if self.dtype is torch.float32 and layer.experts >= screening.PAYS * layer.k:
            self.rough = rough = screening.Rough.of(experts.A_PI, layer.experts)
            if rough is not None:
                layer.rough, layer.errors, layer.sizes = place(rough.A_PI), place(rough.errors_E), place(rough.sizes_E)

    def __call__(self, x: Tensor, rows: Tensor | None) -> Tensor | None:
        """See :class:`spectr.ops.backend.FusedLinear`."""
        if type(x) is not Tensor or x.dtype is not self.dtype or not x.is_cpu or not x.is_contiguous() or watched():
            return None
        if x.shape[-1] != self.inputs or not x.numel():
            return None
        tokens, numbers = x.numel() // self.inputs, own_numbers(self.base, x)
        way = self.ways[place_of(tokens)]
        if way is None or numbers is None:
            return None
        whole, base, add = way
        if whole is None:
            assert base is not None
            assert add is not None
            out = base(x, *numbers)
            return out if add(self.experts, x, rows, out) else None
        if self.rough is not None and self.rough.version != self.experts.A_PI._version:
            self.rough = self.layer.rough = None  # A was changed in place: all of it is read until it is prepared again
        self.layer.W, self.layer.bias = place(numbers[0]), place(numbers[1])
        out = x.new_empty((*x.shape[:-1], self.outputs))
        count = 1 if rows is None else len(rows)
        failed = whole(self.place, place(x), place(rows), place(out), tokens, count, get_num_threads())
        return None if failed else out


def place(tensor: Tensor | None) -> int | None:
    """Where its numbers are."""
    return None if tensor is None else tensor.data_ptr()
