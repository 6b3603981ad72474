"""Compiling C sources with the compiler of this machine, once, and loading what comes of it."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from spectr.atomic_write import cache_folder

# Reductions may be reordered, or nothing is vectorised. Not -ffast-math: it changes how the whole process rounds.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")


_PATIENCE = 600  # seconds for the compiler, which takes ten on an idle machine


def load(source: str) -> ctypes.CDLL:
    """The shared library of a source in this folder.

    Raises:
        OSError: There is no compiler, or it failed, or what it made cannot be loaded.
    """
    try:
        return ctypes.CDLL(str(compiled_library(Path(__file__).with_name(source))))
    except subprocess.SubprocessError as error:
        raise OSError(f"the C compiler failed: {error}") from error


def find_compiler() -> str | None:
    """The C compiler of this machine, if there is one."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def compiled_library(source: Path) -> Path:
    """The file of a source's shared library, compiled once for this machine."""
    compiler = find_compiler()
    if compiler is None:
        raise OSError("there is no C compiler")
    threads = _threads()
    text = b"".join(path.read_bytes() for path in sorted(source.parent.glob("*.[ch]")))
    known = hashlib.sha256(text + repr((compiler, _FLAGS, threads, machine())).encode()).hexdigest()[:16]
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
            made.replace(target)  # atomic, since other processes may compile at the same time
    return target


def _make(compiler: str, source: Path, target: Path, threads: Path | None) -> None:
    """Compile and link; with the threads of the library ``threads``, if there is one."""
    parts = target.with_suffix(".o")
    parallel = ["-fopenmp"] if threads else []
    compiling: list[Any] = [compiler, *_FLAGS, *parallel, "-fPIC", "-c", source, "-o", parts]
    linking: list[Any] = [compiler, "-shared", parts, "-o", target, *([threads] if threads else []), "-lm"]
    linking += ["-Wl,--no-undefined"] if threads else []  # an error now, not when it is loaded
    for command in (compiling, linking):
        subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE)


def _threads() -> Path | None:
    """The OpenMP library whose threads torch works with. Ours must be the same, or the two compete for cores."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    home = str(Path(torch.__file__).parent.parent)
    loaded = {line.split(maxsplit=5)[-1] for line in lines if re.search(r"/lib(gomp|iomp5|omp)[^/]*$", line)}
    found = sorted(path for path in loaded if path.startswith((f"{home}/torch/", f"{home}/torch.libs/")))
    return Path(found[0]) if found else None


def machine() -> str:
    """What code for this machine may not run on another one by."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
