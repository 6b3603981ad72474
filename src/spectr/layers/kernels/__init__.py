"""Routed layers on a CPU: compiled functions in place of many of torch's calls; for few tokens one does it all.

The source is compiled when it is needed first, for this machine, by the C compiler that is there, and kept in the cache
folder. Without a compiler, or with ``SPECTR_KERNELS=0``, torch does the same with more calls.
"""

from spectr.layers.kernels.cpu import MOST_TOKENS, Kernels, cpu_kernels

__all__ = ["MOST_TOKENS", "Kernels", "cpu_kernels"]
