"""Few tokens at a time on a CPU, as in decoding: one call of a compiled function in place of eight of torch's.

The source is compiled when it is needed first, for this machine, by the C compiler that is there, and kept in the cache
folder. Without a compiler, or with ``SPECTR_KERNELS=0``, torch does the same with more calls.
"""

from spectr.layers.kernels.cpu import MOST_TOKENS, Kernels, cpu_kernels

__all__ = ["MOST_TOKENS", "Kernels", "cpu_kernels"]
