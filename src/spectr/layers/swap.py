"""Putting one module in the place of another."""

from __future__ import annotations

from torch import nn


def swap_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` where ``model.get_submodule(name)`` is, and return what was there."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = parent.get_submodule(child)
    parent._modules[child] = new  # keeps the order of modules, and does not ask the parent's __setattr__
    return old
