"""Compute as in eval mode in one thread, while other threads may train the same model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from spectr.layers.weight_reads import uncompiled


class _Thread(threading.local):
    """For each thread, whether it is inside a block."""

    inside: bool = False


_thread = _Thread()
_lock = threading.Lock()
_open: set[int] = set()  # threads that are inside of one


class _Training:
    """Stands in for ``training`` of all modules while a block is open: false in its thread, else the module's own."""

    def __get__(self, module: nn.Module | None, owner: Any = None) -> bool:
        if module is None or "training" not in vars(module):
            raise AttributeError("training")
        return vars(module)["training"] and not _thread.inside

    def __set__(self, module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Have this thread compute without dropout and whatever else training adds.

    ``model.eval()`` would also change what other threads compute, and recompute in a backward pass. So the modules
    keep their flags, and only this thread reads other ones.
    """
    if _thread.inside or not _trains(model):
        yield
        return
    me = threading.get_ident()
    with _lock:
        _open.add(me)
        if "training" not in vars(nn.Module):
            type.__setattr__(nn.Module, "training", _Training())
    _thread.inside = True
    try:
        with uncompiled():  # graphs of training have dropout
            yield
    finally:
        _thread.inside = False
        with _lock:
            _open.discard(me)
            if not _open:
                type.__delattr__(nn.Module, "training")


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
