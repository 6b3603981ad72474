"""Layers by name, of modules and of parameters that their modules compute with by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from spectr.layers.gate import RoutedGate, gate_parameter
from spectr.layers.linear_layers import features, returns_more
from spectr.layers.moe import RoutedExperts, fused_parameters
from spectr.layers.stand_in import StandIn


def stand_in_for(module: nn.Module, parameter: str) -> StandIn | None:
    """What stands in for a module whose parameter is routed; ``None`` where it cannot be."""
    if isinstance(module, StandIn):
        return module
    if parameter in fused_parameters(module):
        return RoutedExperts(module)
    computes = returns_more(module) if features(module) else not isinstance(module, nn.Embedding)
    if computes and gate_parameter(module) == parameter:
        return RoutedGate(module, parameter)
    return None


def parameter_layer(layers: Mapping[str, nn.Module], name: str) -> nn.Module | None:
    """The layer of a parameter; ``None`` where it has none that can be routed.

    Args:
        layers: The model's own modules by name.
        name: Of the parameter.
    """
    module, _, parameter = name.rpartition(".")
    found = stand_in_for(layers[module], parameter) if module in layers else None
    return None if found is None else found._modules.get(parameter)


@contextmanager
def layers_at(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Module]]:
    """The layers of modules and parameters, which the model calls while the block runs; afterwards it is as it was."""
    modules = dict(model.named_modules())
    placed: dict[str, StandIn] = {}
    try:
        found = {}
        for name in names:
            holder, _, parameter = name.rpartition(".")
            if name not in modules and holder not in placed:
                stand_in = stand_in_for(modules[holder], parameter)
                assert stand_in is not None, f"{name} is no layer of this model"
                put(model, holder, stand_in)
                placed[holder] = stand_in
            found[name] = modules[name] if name in modules else placed[holder].layer(parameter)
        yield found
    finally:
        for holder, stand_in in placed.items():
            put(model, holder, stand_in.base)


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of another."""
    parent_name, _, child = name.rpartition(".")
    model.get_submodule(parent_name)._modules[child] = new  # keeps the order, and does not ask the parent's __setattr__
