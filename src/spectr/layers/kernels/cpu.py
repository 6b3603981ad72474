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
from torch import Tensor
from torch.nn.functional import linear

from spectr.layers.kernels.base import Kernels
from spectr.saving import cache_folder

# Reductions may be reordered, or nothing is vectorised. Not -ffast-math: it changes how the whole process rounds.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_FEW = 16  # tokens


class CpuKernels(Kernels):
    """The compiled functions.

    Args:
        library: The loaded shared library.
    """

    device = "cpu"
    dtypes = tuple(_NAMES)

    def __init__(self, library: ctypes.CDLL):
        self._route, self._held = {}, {}
        pointer, number = ctypes.c_void_p, ctypes.c_long
        for dtype, name in _NAMES.items():
            route, held = getattr(library, f"route_{name}"), getattr(library, f"held_{name}")
            route.argtypes = [pointer] * 7 + [number] * 7 + [ctypes.c_float, number]
            held.argtypes = [pointer] * 6 + [number] * 6
            self._route[dtype], self._held[dtype] = route, held

    def route(
        self,
        x: Tensor,
        A_PI: Tensor,
        Bt_PO: Tensor,
        centers_P: Tensor | None,
        prior_BE: Tensor | None,
        out: Tensor,
        *,
        experts: int,
        k: int,
        temperature: float,
    ) -> bool:
        """See :meth:`Kernels.route`."""
        (rows, inputs), outputs = A_PI.shape, Bt_PO.shape[1]
        h = _product(x, A_PI)
        failed = self._route[x.dtype](
            x.data_ptr(),
            A_PI.data_ptr(),
            None if h is None else h.data_ptr(),
            Bt_PO.data_ptr(),
            None if centers_P is None else centers_P.data_ptr(),
            None if prior_BE is None else prior_BE.data_ptr(),
            out.data_ptr(),
            x.numel() // inputs,
            1 if prior_BE is None else len(prior_BE),
            inputs,
            outputs,
            experts,
            rows // experts,
            k,
            temperature,
            torch.get_num_threads(),
        )
        return not failed

    def held(self, x: Tensor, A_PI: Tensor, Bt_PO: Tensor, weights_BP: Tensor, out: Tensor) -> bool:
        """See :meth:`Kernels.held`."""
        (rows, inputs), outputs = A_PI.shape, Bt_PO.shape[1]
        h = _product(x, A_PI)
        failed = self._held[x.dtype](
            x.data_ptr(),
            A_PI.data_ptr(),
            None if h is None else h.data_ptr(),
            Bt_PO.data_ptr(),
            weights_BP.data_ptr(),
            out.data_ptr(),
            x.numel() // inputs,
            len(weights_BP),
            inputs,
            outputs,
            rows,
            torch.get_num_threads(),
        )
        return not failed


def _product(x: Tensor, A_PI: Tensor) -> Tensor | None:
    """``A x`` of many tokens, where torch's product is faster than ours; of few ``None``."""
    return linear(x, A_PI) if x.numel() > _FEW * x.shape[-1] else None


@lru_cache(maxsize=1)
def cpu_kernels() -> Kernels | None:
    """The kernels for this machine; ``None`` where they are not wanted, or cannot be compiled."""
    if os.environ.get("SPECTR_KERNELS") == "0":
        return None
    source = Path(__file__).with_name("routing.c")
    try:
        return CpuKernels(ctypes.CDLL(str(_compiled(source))))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        logging.getLogger(__name__).info("routed layers run without compiled kernels: %s", error)
        return None


def find_compiler() -> str | None:
    """The C compiler of this machine, if there is one."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def _compiled(source: Path) -> Path:
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
