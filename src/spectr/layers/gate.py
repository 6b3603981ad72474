"""A matrix that a module multiplies its input with, without a linear layer: the gate of a mixture of experts (MoE)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from inspect import Parameter, signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from spectr.errors import CompositionError
from spectr.layers.parameter_layer import ParameterLayer
from spectr.layers.stand_in import StandIn

_CASTS = (Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16)


class GateLinear(ParameterLayer):
    """The product of a module's parameter ``W x``, which the module itself computes.

    Args:
        holder: The module that holds the parameter.
        parameter: Its name.
    """

    def __init__(self, holder: nn.Module, parameter: str):
        outputs, inputs = getattr(holder, parameter).shape
        super().__init__(holder, parameter, inputs, outputs)

    def forward(self, x: Float[Tensor, "*T I"], product: Float[Tensor, "*T O"]) -> Float[Tensor, "*T O"]:
        """The product that the module has computed."""
        return product


class RoutedGate(StandIn):
    """A module of whose parameter LoRA experts change the product, in the midst of its ``forward``.

    Args:
        base: The module; never changed.
        parameter: The parameter's name.
    """

    def __init__(self, base: nn.Module, parameter: str):
        super().__init__(base, {parameter: GateLinear(base, parameter)})
        self.parameter = parameter
        _keep_out_of_graphs()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base, with the chosen experts' update added to the product."""
        if not self.takes_part:
            return self.base(*args, **kwargs)
        return self._routed(args, kwargs)

    def _routed(self, args: Any, kwargs: Any) -> Any:
        layer = self.layer(self.parameter)
        with _Products(getattr(self.base, self.parameter), layer) as products:
            out = self.base(*args, **kwargs)
        if not products.met:
            raise CompositionError(
                f"{type(self.base).__name__} did not multiply with its parameter '{self.parameter}' in this call",
                expected="a product by torch.nn.functional.linear, which its experts can change",
                do="omit experts that adapt this parameter",
            )
        return out


@cache
def _keep_out_of_graphs() -> None:
    """Have gates run as they are written in compiled models: Dynamo does not follow the mode. Its import takes long."""
    kind: Any = RoutedGate
    kind._routed = torch.compiler.disable(kind._routed)


class _Products(TorchFunctionMode):
    """Hands each product of a weight to a layer: ``layer(x, W x)`` takes the place of ``W x``.

    Attributes:
        met: Whether there was one.
    """

    def __init__(self, weight: Tensor, layer: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self._weights, self._layer, self.met = [weight], layer, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        out = func(*args, **(kwargs or {}))
        if func in _CASTS and self._knows(args[0]):
            self._weights.append(out)
        elif func is linear and len(args) > 1 and self._knows(args[1]):
            self.met = True
            return self._layer(args[0], out)
        return out

    def _knows(self, tensor: Any) -> bool:
        return any(tensor is weight for weight in self._weights)


def gate_parameter(holder: Any) -> str:
    """The name of the matrix that a module multiplies its input with; empty where it has none that can be routed.

    The module is tried with zeros, as its code alone shows what it does.
    """
    named = [(name, weight) for name, weight in holder.named_parameters(recurse=False) if weight.ndim == 2]
    if len(named) != 1 or not named[0][1].is_floating_point():
        return ""
    name, weight = named[0]
    products = _Products(weight, lambda x, product: product)
    with torch.no_grad(), products, suppress(Exception):  # what comes after the product does not matter
        holder.forward(*_zeros(holder.forward, weight))
    return name if products.met else ""


def _zeros(forward: Callable[..., Any], weight: Tensor) -> list[Tensor]:
    """One token's input of zeros, and a number for each further argument that has to be given."""
    needed = [p for p in signature(forward).parameters.values() if p.default is Parameter.empty and p.kind < 2]
    ids = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
    return [torch.zeros(1, 1, weight.shape[1], device=weight.device, dtype=weight.dtype), *[ids] * (len(needed) - 1)]
