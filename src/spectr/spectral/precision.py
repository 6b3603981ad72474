"""Exact products of what is prepared, whatever context a caller is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Products in the dtypes of their tensors, on CPUs and GPUs. Also decorates functions."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
