"""Putting one module in the place of another, and a model's modules as they were before."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from spectr.layers.parameters import parameter_layer, put, stand_in_for
from spectr.layers.routed_linear import RoutedLinear
from spectr.layers.saved_module import SavedModule
from spectr.layers.stand_in import StandIn


def swap_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` where ``model.get_submodule(name)`` is, and return what was there.

    A parameter's layer is put into what stands in for its module, which comes with the first routed one and leaves with
    the last.
    """
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    parent = parent if isinstance(parent, StandIn) else plain_module(parent)
    if child not in parent._modules:
        stand_in = stand_in_for(parent, child)
        assert stand_in is not None, f"{name} is no layer of this model"
        put(model, parent_name, stand_in)
        parent = stand_in
    old = parent._modules[child]
    assert old is not None
    parent._modules[child] = new  # keeps the order of modules, and does not ask the parent's __setattr__
    if isinstance(parent, StandIn) and not parent.is_routed:
        put(model, parent_name, parent.base)
    return old


def plain_module(module: nn.Module) -> nn.Module:
    """The model's own module, where one of ours stands in for it."""
    while isinstance(module, (RoutedLinear, SavedModule, StandIn)):
        module = module.base
    return module


def plain_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules(remove_duplicate=False)`` of the model before it was composed."""
    module = plain_module(model)
    yield name, module
    for child, inner in module._modules.items():
        if inner is not None:
            yield from plain_modules(inner, f"{name}.{child}" if name else child)


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of a module or a parameter, as it was before the model was composed."""
    layers = dict(plain_modules(model))
    layer = layers.get(name) or parameter_layer(layers, name)
    assert layer is not None, f"{name} is no layer of this model"
    return layer
