"""Weights as torchao and quanto quantise them: a subclass of tensors that says it is float32, and multiplies."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear


class Int8(Tensor):
    """Integers and a scale for each row. Whatever is no product or look-up is refused, as by torchao."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers: Tensor, scale: Tensor):
        self.numbers, self.scale = numbers, scale

    @property
    def dense(self) -> Tensor:
        return self.numbers.float() * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        given = kwargs or {}
        if func in (linear, embedding):
            args, given = [each.dense if isinstance(each, Int8) else each for each in args], dict(given)
            return func(*args, **given)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **given)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Int8(args[0].numbers, args[0].scale)
        return NotImplemented  # torch refuses the operation

    def __deepcopy__(self, memo):
        return self

    def __repr__(self) -> str:
        return f"Int8({tuple(self.shape)})"


@torch.no_grad()
def quantised(model: nn.Module, names: list[str]) -> tuple[nn.Module, nn.Module]:
    """The model with these modules' weights quantised, and a copy with what they compute with."""
    dense = copy.deepcopy(model)
    for name in names:
        weight = model.get_submodule(name).weight
        scale = weight.abs().amax(1, keepdim=True) / 127
        packed = Int8((weight / scale).round().to(torch.int8), scale)
        model.get_submodule(name).weight = nn.Parameter(packed, requires_grad=False)
        dense.get_submodule(name).weight = nn.Parameter(packed.dense)
    return model, dense
