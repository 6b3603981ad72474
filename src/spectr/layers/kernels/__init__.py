"""Compiled functions in place of many of torch's calls, for CPUs and for GPUs.

For a CPU a C source is compiled when it is needed first, by the compiler that is there, and kept in the cache folder;
for a GPU Triton does that. Without them, or with ``SPECTR_KERNELS=0``, torch does the same with more calls.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

from spectr.layers.kernels.base import Choice, Kernels, Whole
from spectr.layers.kernels.cpu import cpu_kernels

__all__ = ["Choice", "Kernels", "Whole", "cpu_kernels", "kernels_for"]


def kernels_for(device: str) -> Kernels | None:
    """The kernels for a kind of device, if there are any."""
    if device == "cpu":
        return cpu_kernels()
    return _gpu_kernels() if device == "cuda" else None


@lru_cache(maxsize=1)
def _gpu_kernels() -> Kernels | None:
    if find_spec("triton") is None:
        return None
    from spectr.layers.kernels.gpu import gpu_kernels

    return gpu_kernels()
