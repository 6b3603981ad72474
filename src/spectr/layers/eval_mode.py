"""Compute as in eval mode in one thread, while other threads may train the same model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from spectr.layers.shared_context import SharedContext
from spectr.layers.weight_reads import uncompiled


class _Thread(threading.local):
    """For each thread, whether it is inside a block."""

    inside: bool = False


_thread = _Thread()


class _Training:
    """Stands in for ``training`` of all modules while a block is open: false in its thread, else the module's own."""

    def __get__(self, module: nn.Module | None, owner: Any = None) -> bool:
        if module is None or "training" not in vars(module):
            raise AttributeError("training")
        return vars(module)["training"] and not _thread.inside

    def __set__(self, module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value


@contextmanager
def _replaced() -> Iterator[None]:
    type.__setattr__(nn.Module, "training", _Training())
    try:
        yield
    finally:
        type.__delattr__(nn.Module, "training")


_while_any_reads = SharedContext(_replaced)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Have this thread compute without dropout and whatever else training adds.

    ``model.eval()`` would also change what other threads compute, and recompute in a backward pass. So the modules
    keep their flags, and only this thread reads other ones.
    """
    if _thread.inside or not _trains(model):
        yield
        return
    with uncompiled(), _while_any_reads():  # graphs of training have dropout
        _thread.inside = True
        try:
            yield
        finally:
            _thread.inside = False


def _trains(model: nn.Module) -> bool:
    """Whether any module is in training mode; several times faster than by ``modules()``."""
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None:
            if module.training:
                return True
            left += module._modules.values()
    return False
