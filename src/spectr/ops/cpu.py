"""The backend for CPUs: C functions, compiled when they are needed first. Their plain form is in reference.py."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spectr.ops.base import Backend, Choice, FusedLinear
from spectr.ops.compiling import load, machine
from spectr.ops.fused_linear import Calls, FusedCpuLinear, Layer, place

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_FEW = 16  # tokens up to which one call reads each weight once; of more, products by torch are faster
_FEW_BY_TILES = {
    torch.float32: 16,
    torch.bfloat16: 8,
}  # or by tiles, where there are any, as measured (docs/appendix/speed.md)
_DENSE_PAYS = 2  # experts for each chosen one up to which a product with all of them and zeros is faster than sums
_SMALL = 1 << 18  # terms of scores that one thread sums before a second one has begun


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

    def choose(self, h_TP: Tensor, centers_P: Tensor | None, prior_BE: Tensor | None, choice: Choice) -> bool:
        """See :meth:`Backend.choose`."""
        experts, k, temperature, _ = choice
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
        choice: Choice,
    ) -> bool:
        """See :meth:`Backend.add_chosen`."""
        layer, threads = Layer.of(A_PI, Bt_PO, centers_P, choice), torch.get_num_threads()
        tokens, rows = x.numel() // layer.inputs, 1 if prior_BE is None else len(prior_BE)
        at, prior, to = ctypes.addressof(layer), place(prior_BE), place(out)
        at_once = self._calls("route", x.dtype).of(tokens)
        if at_once is not None:
            return not at_once(at, place(x), prior, to, tokens, rows, threads)
        h = linear(x, A_PI)
        if choice.experts > _DENSE_PAYS * choice.k:
            return not self._functions["route_many", x.dtype](at, place(h), prior, to, tokens, rows, threads)
        if not self._choose(layer, h, prior_BE):
            return False
        sums = out.view(tokens, layer.outputs)
        torch.addmm(sums, h.view(tokens, layer.rows), Bt_PO, out=sums)
        return True

    def add_weighted(self, x: Tensor, A_PI: Tensor, Bt_PO: Tensor, weights_BP: Tensor, out: Tensor) -> bool:
        """See :meth:`Backend.add_weighted`."""
        layer, tokens = Layer.of(A_PI, Bt_PO), x.numel() // A_PI.shape[1]
        held = self._calls("held", x.dtype).of(tokens)
        places = (place(x), place(weights_BP), place(out), tokens, len(weights_BP), torch.get_num_threads())
        return held is not None and not held(ctypes.addressof(layer), *places)

    def fused_linear(
        self, base: nn.Module, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, choice: Choice | None
    ) -> FusedLinear | None:
        """See :meth:`Backend.fused_linear`."""
        if type(base) is not nn.Linear:
            return None
        layer = Layer.of(A_PI, Bt_PO, centers_P, choice)
        calls = self._calls("held" if choice is None else "route", A_PI.dtype)
        return FusedCpuLinear(base, (A_PI, Bt_PO, centers_P), layer, calls)

    def _calls(self, name: str, dtype: torch.dtype) -> Calls:
        few, tiles = self._functions[name, dtype], self._functions.get(("tiles", dtype))
        if tiles is None:
            return Calls(few, _FEW, None)
        held = name == "held"
        return Calls(few, _FEW_BY_TILES[dtype], lambda *call: tiles(*call[:-1], held, parts_of_float32(), call[-1]))


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
    """Of how many bfloat16 a float32 is to be the sum where it is multiplied by tiles, as torch's setting has it."""
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
