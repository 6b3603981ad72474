"""Compiling the kernels and calling them."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectr.layers.kernels.base import Kernels
from spectr.saving import cache_folder

# Reductions may be reordered, or nothing is vectorised. Not -ffast-math: it changes how the whole process rounds.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class CpuKernels(Kernels):
    """The compiled functions.

    Args:
        library: The loaded shared library.
    """

    device = "cpu"
    dtypes = tuple(_NAMES)
    most_tokens = 16  # beyond, matrix products by torch are faster

    def __init__(self, library: ctypes.CDLL):
        self._route, self._held, self._select = {}, {}, {}
        pointer, number = ctypes.c_void_p, ctypes.c_long
        for dtype, name in _NAMES.items():
            route, held = getattr(library, f"route_{name}"), getattr(library, f"held_{name}")
            route.argtypes = [pointer] * 6 + [number] * 7 + [ctypes.c_float]
            held.argtypes = [pointer] * 5 + [number] * 5
            select = getattr(library, f"select_{name}")
            select.argtypes = [pointer] * 5 + [number] * 5 + [ctypes.c_float]
            self._route[dtype], self._held[dtype], self._select[dtype] = route, held, select

    def select(
        self,
        h: Tensor,
        centers_P: Tensor | None,
        prior_BE: Tensor | None,
        *,
        experts: int,
        k: int,
        temperature: float,
        pick: bool,
    ) -> tuple[Tensor, Tensor] | None:
        """See :meth:`Kernels.select`."""
        rows, rank = h.shape[-1], h.shape[-1] // experts
        tokens = h.numel() // rows
        picked = torch.empty(tokens, k * rank, dtype=torch.int64) if pick else h
        shares = torch.empty(tokens, k * rank, dtype=h.dtype) if pick else h
        failed = self._select[h.dtype](
            h.data_ptr(),
            None if centers_P is None else centers_P.data_ptr(),
            None if prior_BE is None else prior_BE.data_ptr(),
            picked.data_ptr() if pick else None,
            shares.data_ptr(),
            tokens,
            1 if prior_BE is None else len(prior_BE),
            experts,
            rank,
            k,
            temperature,
        )
        return None if failed else (picked, shares)

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
        inputs, outputs = A_PI.shape[1], Bt_PO.shape[1]
        failed = self._route[x.dtype](
            x.data_ptr(),
            A_PI.data_ptr(),
            Bt_PO.data_ptr(),
            None if centers_P is None else centers_P.data_ptr(),
            None if prior_BE is None else prior_BE.data_ptr(),
            out.data_ptr(),
            x.numel() // inputs,
            1 if prior_BE is None else len(prior_BE),
            inputs,
            outputs,
            experts,
            len(A_PI) // experts,
            k,
            temperature,
        )
        return not failed

    def held(self, x: Tensor, A_PI: Tensor, Bt_PO: Tensor, weights_BP: Tensor, out: Tensor) -> bool:
        """See :meth:`Kernels.held`."""
        inputs, outputs = A_PI.shape[1], Bt_PO.shape[1]
        failed = self._held[x.dtype](
            x.data_ptr(),
            A_PI.data_ptr(),
            Bt_PO.data_ptr(),
            weights_BP.data_ptr(),
            out.data_ptr(),
            x.numel() // inputs,
            len(weights_BP),
            inputs,
            outputs,
            len(A_PI),
        )
        return not failed


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
    text = b"".join(path.read_bytes() for path in sorted(source.parent.glob("*.[ch]")))
    known = hashlib.sha256(text + repr((compiler, _FLAGS, _machine())).encode()).hexdigest()[:16]
    folder = cache_folder() / "kernels"
    target = folder / f"{source.stem}-{known}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / target.name
            command: list[Any] = [compiler, *_FLAGS, "-shared", "-fPIC", "-o", made, source, "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            made.replace(target)  # whole or not at all, whoever else compiles at this moment
    return target


def _machine() -> str:
    """What code for this machine may not run on another one by."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
