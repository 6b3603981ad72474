"""Tests of the kernels in C, which are made when they are needed first."""

import pytest

from spectr.ops.compiling import find_compiler

# Where there is a compiler, a source that does not compile is a failure, not a reason to skip. Where there is none,
# there are no kernels to test, and torch does their work: test_without_a_compiler_torch_does_it.
needs_a_compiler = pytest.mark.skipif(find_compiler() is None, reason="this machine has no C compiler to test")
