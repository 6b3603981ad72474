"""What stands in for a module whose parameters are routed, where it computes with them by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from spectr.errors import CompositionError
from spectr.layers.names import take_names_of_base
from spectr.layers.routed_linear import RoutedLinear


class StandIn(nn.Module):
    """A module that has a layer for each parameter that can be routed, under the parameter's name.

    Everything else is the base's: attributes (the parameters themselves among them) and the names in ``state_dict``.

    Args:
        base: The module; never changed.
        layers: By parameter, what a routed layer takes the place of.
    """

    def __init__(self, base: nn.Module, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.base = base
        self._modules.update(layers)  # add_module would meet the base's parameters
        take_names_of_base(self)
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        """As the base has it."""
        base = self.__dict__.get("_modules", {}).get("base")
        if base is None:
            raise AttributeError(name)
        if name == "base":
            return base
        found = getattr(base, name)
        if name in self._modules and isinstance(found, FakeTensor):  # torch.export puts them there
            self.refuse_to_capture()
        return found

    def refuse_to_capture(self) -> NoReturn:
        """Raise :class:`CompositionError`: a graph would lack the experts' choice, or freeze it."""
        raise CompositionError(
            f"experts adapt parameters of {type(self.base).__name__}, and such a model cannot be exported or traced",
            expected="torch.compile, or a model whose experts adapt linear layers",
            do="merge the experts into the base first: spectr merge --into-base",
        )

    def layer(self, parameter: str) -> nn.Module:
        """The layer of a parameter, routed or not."""
        layer = self._modules[parameter]
        assert layer is not None
        return layer

    @property
    def is_routed(self) -> bool:
        """Whether LoRA experts adapt a parameter."""
        return any(isinstance(layer, RoutedLinear) for layer in self._modules.values())

    @property
    def takes_part(self) -> bool:
        """Whether a parameter's layer does more than the base in this thread's call, or a hook observes it."""
        return any(_takes_part(layer) for name, layer in self._modules.items() if name != "base")


def _takes_part(layer: nn.Module | None) -> bool:
    if layer is None or layer._forward_pre_hooks:
        return layer is not None
    call = layer.in_force() if isinstance(layer, RoutedLinear) else None
    return call is not None and (call.factors is not None or call.observe is not None)
