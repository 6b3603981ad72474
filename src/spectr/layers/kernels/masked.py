"""Decisions of packed layers whose tokens may each use other experts, as compiled functions; see masked.c."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectr.layers.kernels.cpu import compiled_library, has_unit
from spectr.layers.kernels.whole import place

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Part(NamedTuple):
    """One module of a packed layer.

    Attributes:
        Bt_PO: Its experts' output factors, transposed, contiguous.
        centers_P: Taken away before scoring, if anything is.
        begin: Where its output lies in the layer's.
    """

    Bt_PO: Tensor
    centers_P: Tensor | None
    begin: int


class _Module(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("Bt", "centers")),
        *((name, ctypes.c_long) for name in ("rows", "first", "begin", "length")),
    )


class _Packed(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("modules", "columns")),
        *((name, ctypes.c_long) for name in ("count", "experts", "k", "outputs", "width")),
        ("temperature", ctypes.c_float),
    )


class Masked:
    """A packed layer as the compiled functions know it. Its tensors may change in place, and are kept.

    Args:
        parts: The modules, which have the same experts of one rank.
        columns_E: Of these experts in a token's mask.
        k: How many are taken at most.
        temperature: Of the softmax over their scores; 0 weighs them alike.
        outputs: Of the base layer, which stand before ``A x`` of the modules in what is given.
    """

    def __init__(self, parts: Sequence[Part], columns_E: Tensor, k: int, temperature: float, outputs: int):
        self.parts, self.rows, self.outputs = tuple(parts), sum(len(part.Bt_PO) for part in parts), outputs
        self.columns_E = columns_E.to(torch.int32).contiguous()
        modules, first = [], outputs
        for part in parts:
            rows, length = part.Bt_PO.shape
            modules.append(_Module(place(part.Bt_PO), place(part.centers_P), rows, first, part.begin, length))
            first += rows
        self._modules = (_Module * len(modules))(*modules)
        sizes = (len(modules), len(columns_E), k, outputs, first, temperature)
        self._packed = _Packed(ctypes.addressof(self._modules), place(self.columns_E), *sizes)
        self._at = ctypes.addressof(self._packed)

    def decide(self, y_TW: Tensor, allowed_TF: Tensor, kept: tuple[Tensor, Tensor, Tensor] | None, weighted: Tensor):
        """Write ``w A x`` of each module, (T, P) one after the other, into ``weighted``.

        Args:
            y_TW: The base layer's outputs and ``A x``, contiguous.
            allowed_TF: Which experts each token may use.
            kept: Which tokens' scores and weights to keep, (N,), and where, (M, S, E) with M at least N.
            weighted: With room for it.

        Returns:
            Whether there was memory for it.
        """
        decide, threads = _function("decide", y_TW.dtype), torch.get_num_threads()
        asked = (None, 0, None, None) if kept is None else (place(kept[0]), len(kept[0]), *map(place, kept[1:]))
        return not decide(
            self._at, place(y_TW), place(allowed_TF), allowed_TF.stride(0), place(weighted), *asked, len(y_TW), threads
        )

    def add(self, y_TW: Tensor, weighted: Tensor, out_TO: Tensor) -> bool:
        """Write the base layer's outputs and what the experts add into ``out_TO``, one token after the other."""
        return not _function("add", y_TW.dtype)(self._at, place(y_TW), place(weighted), place(out_TO), len(y_TW))


def add_rows(y_TO: Tensor, added_TO: Tensor, out_TO: Tensor) -> None:
    """Write the sum of two into a third; each may be a part of wider rows."""
    strides = (y_TO.stride(0), added_TO.stride(0), out_TO.stride(0))
    _function("sum", y_TO.dtype)(place(y_TO), place(added_TO), place(out_TO), *strides, *added_TO.shape)


def few_tokens(dtype: torch.dtype) -> int:
    """Tokens up to which outputs made from the chosen rows alone are faster than products, as measured."""
    return 6 if has_unit(dtype) else 32


def masked_works(dtype: torch.dtype) -> bool:
    """Whether there are compiled functions for this dtype on this machine."""
    return dtype in _NAMES and _library() is not None


@lru_cache(maxsize=8)
def _function(name: str, dtype: torch.dtype) -> Any:
    library = _library()
    assert library is not None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    found = getattr(library, f"{name}_{_NAMES[dtype]}")
    found.argtypes = {
        "decide": [pointer] * 3 + [number, pointer, pointer, number, pointer, pointer, number, number],
        "add": [pointer] * 4 + [number],
        "sum": [pointer] * 3 + [number] * 5,
    }[name]
    return found


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    if os.environ.get("SPECTR_KERNELS") == "0":
        return None
    try:
        return ctypes.CDLL(str(compiled_library(Path(__file__).with_name("masked.c"))))
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).info("layers in vLLM run without compiled kernels: %s", error)
        return None
