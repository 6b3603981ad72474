"""Compiling the kernels and calling them."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spectr.atomic_write import cache_folder
from spectr.layers.kernels.base import Choice, Kernels, Whole
from spectr.layers.kernels.fused_linear import Calls, Layer, WholeLayer, place

# Reductions may be reordered, or nothing is vectorised. Not -ffast-math: it changes how the whole process rounds.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_FEW = 16  # tokens up to which one call reads each weight once; of more, products by torch are faster
_FEW_BY_TILES = {torch.float32: 16, torch.bfloat16: 8}  # or by tiles, where there are any, as measured (docs/speed.md)
_DENSE_PAYS = 2  # experts for each chosen one up to which a product with all of them and zeros is faster than sums
_SMALL = 1 << 18  # scores' terms that one thread is through with before a second one has begun


class CpuKernels(Kernels):
    """The compiled functions.

    Args:
        library: The loaded shared library.
    """

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

    def route(
        self,
        x: Tensor,
        A_PI: Tensor,
        Bt_PO: Tensor,
        centers_P: Tensor | None,
        prior_BE: Tensor | None,
        out: Tensor,
        choice: Choice,
    ) -> bool:
        """See :meth:`Kernels.route`."""
        layer, threads = Layer.of(A_PI, Bt_PO, centers_P, choice), torch.get_num_threads()
        tokens, rows = x.numel() // layer.inputs, 1 if prior_BE is None else len(prior_BE)
        at, prior, to = ctypes.addressof(layer), place(prior_BE), place(out)
        at_once = self._calls("route", x.dtype).of(tokens)
        if at_once is not None:
            return not at_once(at, place(x), prior, to, tokens, rows, threads)
        h = linear(x, A_PI)
        if choice.experts > _DENSE_PAYS * choice.k:
            return not self._functions["route_many", x.dtype](at, place(h), prior, to, tokens, rows, threads)
        few = 1 if h.numel() < _SMALL else threads
        if self._functions["select", x.dtype](at, place(h), prior, tokens, rows, few):
            return False
        sums = out.view(tokens, layer.outputs)
        torch.addmm(sums, h.view(tokens, layer.rows), Bt_PO, out=sums)
        return True

    def held(self, x: Tensor, A_PI: Tensor, Bt_PO: Tensor, weights_BP: Tensor, out: Tensor) -> bool:
        """See :meth:`Kernels.held`."""
        layer, tokens = Layer.of(A_PI, Bt_PO), x.numel() // A_PI.shape[1]
        held = self._calls("held", x.dtype).of(tokens)
        places = (place(x), place(weights_BP), place(out), tokens, len(weights_BP), torch.get_num_threads())
        return held is not None and not held(ctypes.addressof(layer), *places)

    def whole(
        self, base: nn.Module, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, choice: Choice | None
    ) -> Whole | None:
        """See :meth:`Kernels.whole`."""
        if type(base) is not nn.Linear:
            return None
        layer = Layer.of(A_PI, Bt_PO, centers_P, choice)
        calls = self._calls("held" if choice is None else "route", A_PI.dtype)
        return WholeLayer(base, (A_PI, Bt_PO, centers_P), layer, calls)

    def _calls(self, name: str, dtype: torch.dtype) -> Calls:
        few, tiles = self._functions[name, dtype], self._functions.get(("tiles", dtype))
        if tiles is None:
            return Calls(few, _FEW, None)
        held = name == "held"
        return Calls(few, _FEW_BY_TILES[dtype], lambda *call: tiles(*call[:-1], held, parts_of_float32(), call[-1]))


def parts_of_float32() -> int:
    """Of how many bfloat16 a float32 is to be the sum where it is multiplied by tiles, as torch is told."""
    return 3 if torch.get_float32_matmul_precision() == "highest" else 2


def tiles_work(library: ctypes.CDLL) -> bool:
    """Whether the functions were compiled for this machine's tiles, and system and user let us use them."""
    return has_unit() and hasattr(library, "tiles_allowed") and bool(library.tiles_allowed())


def has_unit() -> bool:
    """Whether this machine has a matrix unit for bfloat16, which is not to be left alone.

    That is said by ``ONEDNN_MAX_CPU_ISA``, which torch's own products go by, too.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return "amx_bf16" in _machine() and (allowed in ("", "ALL", "DEFAULT") or "AMX" in allowed)


@lru_cache(maxsize=1)
def cpu_kernels() -> Kernels | None:
    """The kernels for this machine; ``None`` where they are not wanted, or cannot be compiled."""
    if os.environ.get("SPECTR_KERNELS") == "0":
        return None
    source = Path(__file__).with_name("routing.c")
    try:
        return CpuKernels(ctypes.CDLL(str(compiled_library(source))))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        logging.getLogger(__name__).info("routed layers run without compiled kernels: %s", error)
        return None


def find_compiler() -> str | None:
    """The C compiler of this machine, if there is one."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def compiled_library(source: Path) -> Path:
    """The shared library of a source beside this file, compiled once for this machine."""
    compiler = find_compiler()
    if compiler is None:
        raise OSError("there is no C compiler")
    threads = _threads()
    text = b"".join(path.read_bytes() for path in sorted(source.parent.glob("*.[ch]")))
    known = hashlib.sha256(text + repr((compiler, _FLAGS, threads, _machine())).encode()).hexdigest()[:16]
    folder = cache_folder() / "kernels"
    target = folder / f"{source.stem}-{known}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / target.name
            try:
                _make(compiler, source, made, threads)
            except subprocess.CalledProcessError:
                if threads is None:
                    raise
                _make(compiler, source, made, None)  # a compiler whose threads are not torch's
            made.replace(target)  # whole or not at all, whoever else compiles at this moment
    return target


def _make(compiler: str, source: Path, target: Path, threads: Path | None) -> None:
    """Compile and link; with the threads of the library ``threads``, if there is one."""
    parts = target.with_suffix(".o")
    parallel = ["-fopenmp"] if threads else []
    compiling: list[Any] = [compiler, *_FLAGS, *parallel, "-fPIC", "-c", source, "-o", parts]
    linking: list[Any] = [compiler, "-shared", parts, "-o", target, *([threads] if threads else []), "-lm"]
    linking += ["-Wl,--no-undefined"] if threads else []  # told now, not when it is loaded
    for command in (compiling, linking):
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def _threads() -> Path | None:
    """The OpenMP library whose threads torch works with. Ours have to be the same, or they get in each other's way."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    home = str(Path(torch.__file__).parent.parent)
    loaded = {line.split(maxsplit=5)[-1] for line in lines if re.search(r"/lib(gomp|iomp5|omp)[^/]*$", line)}
    found = sorted(path for path in loaded if path.startswith((f"{home}/torch/", f"{home}/torch.libs/")))
    return Path(found[0]) if found else None


def _machine() -> str:
    """What code for this machine may not run on another one by."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
