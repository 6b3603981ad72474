"""A parameter that a module computes with by itself, as a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ParameterLayer(nn.Module):
    """A layer without parameters of its own: its weight is another module's parameter.

    Args:
        holder: The module that holds the parameter.
        parameter: Its name.
        inputs: Of a matrix of the parameter.
        outputs: Of a matrix of the parameter.
    """

    def __init__(self, holder: nn.Module, parameter: str, inputs: int, outputs: int):
        super().__init__()
        self._holder, self.parameter = (holder,), parameter  # in a tuple, so that it is no part of this module
        self.in_features, self.out_features = inputs, outputs
        self.train(holder.training)

    @property
    def holder(self) -> Any:
        """The module that holds the parameter."""
        return self._holder[0]

    @property
    def weight(self) -> Tensor:
        """The parameter."""
        return getattr(self.holder, self.parameter)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.parameter}, {tuple(self.weight.shape)}"
