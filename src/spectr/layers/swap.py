"""Putting one module in the place of another, and a model's modules as they were before."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from spectr.layers.routed import RoutedLinear
from spectr.layers.saved import SavedModule


def swap_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` where ``model.get_submodule(name)`` is, and return what was there."""
    parent_name, _, child = name.rpartition(".")
    parent = plain_module(model.get_submodule(parent_name))
    old = parent.get_submodule(child)
    parent._modules[child] = new  # keeps the order of modules, and does not ask the parent's __setattr__
    return old


def plain_module(module: nn.Module) -> nn.Module:
    """The model's own module, where one of ours stands in for it."""
    while isinstance(module, (RoutedLinear, SavedModule)):
        module = module.base
    return module


def plain_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules(remove_duplicate=False)`` of the model before it was composed."""
    module = plain_module(model)
    yield name, module
    for child, inner in module._modules.items():
        if inner is not None:
            yield from plain_modules(inner, f"{name}.{child}" if name else child)
