"""The backend for CPUs: C functions, compiled when they are needed first. Their plain form is in reference.py."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spectr.ops.backend import Backend, FusedLinear, Selector
from spectr.ops.compiling import load, machine
from spectr.ops.fused_linear import Experts, FusedCpuLinear, Layer, Way, place
from spectr.ops.trials import Trials
from spectr.ops.ways import Shape, place_of

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_SMALL = 1 << 18  # terms of scores that one thread sums before a second one starts


class CpuBackend(Backend):
    """The compiled functions.

    Args:
        library: The loaded shared library.
    """

    name = "C"
    device = "cpu"
    dtypes = tuple(_NAMES)

    def __init__(self, library: ctypes.CDLL):
        pointer, number = ctypes.c_void_p, ctypes.c_long
        signatures = {
            "route": [pointer] * 4 + [number] * 3,
            "route_many": [pointer] * 4 + [number] * 3,
            "held": [pointer] * 4 + [number] * 3,
            "lanes": [pointer] * 4 + [number] * 4,
            "select": [pointer] * 3 + [number] * 3,
        }
        if tiles_work(library):
            signatures["tiles"] = [pointer] * 4 + [number] * 5
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        for dtype, suffix in _NAMES.items():
            for name, arguments in signatures.items():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes = arguments
                self._functions[name, dtype] = function
        self._trials = Trials(self, library._name)

    def ways(self, dtype: torch.dtype, chooses: bool) -> Mapping[str, Way]:
        """All ways to compute a layer, by name.

        Args:
            dtype: Of the layer.
            chooses: Whether tokens choose; else their weights are fixed.
        """
        ways, tiles, lanes = {}, self._functions.get(("tiles", dtype)), self._functions["lanes", dtype]
        at_once = {"rows": self._functions["route" if chooses else "held", dtype]}
        at_once["lanes"] = lambda *call: lanes(*call[:-1], not chooses, call[-1])
        if tiles is not None:
            at_once["tiles"] = lambda *call: tiles(*call[:-1], not chooses, parts_of_float32(), call[-1])
        for name, function in at_once.items():
            ways[name] = Way(whole=function)
            ways[f"torch+{name}"] = Way(base=linear, add=partial(_add_at_once, function))
        if chooses:
            for name, add in {"sums": self._add_sums, "dense": self._add_dense}.items():
                ways[f"torch+{name}"] = Way(base=linear, add=partial(add, linear))
                if dtype is torch.bfloat16:
                    ways[f"float+{name}"] = Way(base=linear_in_float, add=partial(add, linear_in_float))
        return ways

    def choose(self, h_TP: Tensor, centers_P: Tensor | None, prior_BE: Tensor | None, select: Selector) -> bool:
        """See :meth:`Backend.choose`."""
        experts, k, temperature, _ = select
        layer = Layer(centers=place(centers_P), rows=h_TP.shape[-1], experts=experts, k=k, temperature=temperature)
        return self._choose(layer, h_TP, prior_BE)

    def _choose(self, layer: Layer, h_TP: Tensor, prior_BE: Tensor | None) -> bool:
        tokens, rows = h_TP.numel() // layer.rows, 1 if prior_BE is None else len(prior_BE)
        threads = 1 if h_TP.numel() < _SMALL else torch.get_num_threads()
        select = self._functions["select", h_TP.dtype]
        return not select(ctypes.addressof(layer), place(h_TP), place(prior_BE), tokens, rows, threads)

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
        """See :meth:`Backend.add_chosen`."""
        experts = Experts(Layer.of(A_PI, Bt_PO, centers_P, select), A_PI, Bt_PO, centers_P)
        return self._add(shape_of(A_PI, Bt_PO, select), experts, x, prior_BE, out)

    def add_weighted(self, x: Tensor, A_PI: Tensor, Bt_PO: Tensor, weights_BP: Tensor, out: Tensor) -> bool:
        """See :meth:`Backend.add_weighted`."""
        experts = Experts(Layer.of(A_PI, Bt_PO), A_PI, Bt_PO, None)
        return self._add(shape_of(A_PI, Bt_PO, None), experts, x, weights_BP, out)

    def _add(self, shape: Shape, experts: Experts, x: Tensor, rows: Tensor | None, out: Tensor) -> bool:
        way = self._trials.after_base(shape)[place_of(x.numel() // shape.inputs)]
        return way is not None and way.add is not None and way.add(experts, x, rows, out)

    def _add_sums(self, product: Any, experts: Experts, x: Tensor, prior_BE: Tensor | None, out: Tensor) -> bool:
        layer, h = experts.layer, product(x, experts.A_PI)
        tokens, rows = x.numel() // layer.inputs, 1 if prior_BE is None else len(prior_BE)
        add, places = self._functions["route_many", x.dtype], (place(h), place(prior_BE), place(out))
        return not add(ctypes.addressof(layer), *places, tokens, rows, torch.get_num_threads())

    def _add_dense(self, product: Any, experts: Experts, x: Tensor, prior_BE: Tensor | None, out: Tensor) -> bool:
        layer, h = experts.layer, product(x, experts.A_PI)
        if not self._choose(layer, h, prior_BE):
            return False
        sums = out.view(-1, layer.outputs)
        torch.addmm(sums, h.view(-1, layer.rows), experts.Bt_PO, out=sums)
        return True

    def prepare(
        self, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, select: Selector | None, linear: FusedLinear | None
    ) -> str:
        """See :meth:`Backend.prepare`."""
        return self._trials.reason(shape_of(A_PI, Bt_PO, select), whole=linear is not None)

    def fused_linear(
        self, base: nn.Module, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, select: Selector | None
    ) -> FusedLinear | None:
        """See :meth:`Backend.fused_linear`."""
        if type(base) is not nn.Linear:
            return None
        experts = Experts(Layer.of(A_PI, Bt_PO, centers_P, select), A_PI, Bt_PO, centers_P)
        return FusedCpuLinear(base, experts, self._trials.best(shape_of(A_PI, Bt_PO, select)))


def _add_at_once(function: Any, experts: Experts, x: Tensor, rows: Tensor | None, out: Tensor) -> bool:
    layer, count = experts.layer, 1 if rows is None else len(rows)
    places, tokens = (place(x), place(rows), place(out)), x.numel() // layer.inputs
    return not function(ctypes.addressof(layer), *places, tokens, count, torch.get_num_threads())


def linear_in_float(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product of float32, which processors without units for bfloat16 multiply sooner."""
    return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def shape_of(A_PI: Tensor, Bt_PO: Tensor, select: Selector | None) -> Shape:
    """What a layer's time depends on."""
    (rows, inputs), outputs = A_PI.shape, Bt_PO.shape[1]
    experts, k = (rows, 0) if select is None else (select.experts, select.k)
    return Shape(A_PI.dtype, inputs, outputs, rows // experts, experts, k)


def available() -> Backend:
    """The backend for this machine.

    Raises:
        OSError: It cannot be compiled.
    """
    try:
        return CpuBackend(load("routing.c"))
    except AttributeError as error:
        raise OSError(str(error)) from error


def parts_of_float32() -> int:
    """How many bfloat16 parts replace a float32 in products by tiles, by torch's setting."""
    return 3 if torch.get_float32_matmul_precision() == "highest" else 2


def tiles_work(library: ctypes.CDLL) -> bool:
    """Whether the functions were compiled for this machine's tiles, and system and user let us use them."""
    return has_unit() and hasattr(library, "tiles_allowed") and bool(library.tiles_allowed())


def has_unit() -> bool:
    """Whether this machine has a matrix unit for bfloat16 that may be used.

    ``ONEDNN_MAX_CPU_ISA`` can forbid it, which torch's own products go by, too.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return "amx_bf16" in machine() and (allowed in ("", "ALL", "DEFAULT") or "AMX" in allowed)
