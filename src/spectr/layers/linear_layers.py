"""What counts as a linear layer, and where and in which dtype its experts have to be."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The last one is the output projection of nn.MultiheadAttention, which reads its weight and never calls it: an expert
# there would silently do nothing.
_NOT_LINEAR = (nn.Embedding, nn.modules.conv._ConvNd, nn.Bilinear, nn.modules.linear.NonDynamicallyQuantizableLinear)


class Features(NamedTuple):
    """Numbers of inputs and outputs of a linear layer."""

    inputs: int
    outputs: int


def features(module: nn.Module) -> Features | None:
    """The sizes of anything that maps (..., inputs) to (..., outputs); ``None`` for other modules.

    ``nn.Linear`` and all that carry ``in_features`` and ``out_features`` (quantised layers of bitsandbytes, GPTQ and
    the like), and transformers' ``Conv1D`` (``nx`` and ``nf``). Not the output projection of ``nn.MultiheadAttention``,
    which is never called.
    """
    if isinstance(module, _NOT_LINEAR):
        return None
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):
        sizes = (getattr(module, inputs, None), getattr(module, outputs, None))
        if all(isinstance(size, int) for size in sizes):
            return Features(*sizes)  # pyright: ignore[reportArgumentType]
    return None


def returns_more(module: nn.Module) -> bool:
    """Whether a subclass of ``nn.Linear`` returns more than its product, as the routers of Llama 4 and Phi MoE do.

    It is tried with zeros, as its code alone shows what it does.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:  # quantised
        return False
    out = None
    with torch.no_grad(), suppress(Exception):  # a layer that needs another input still counts as one
        out = module.forward(weight.new_zeros(1, module.in_features))
    return isinstance(out, tuple)


def is_plain(weight: Any) -> bool:
    """Whether a tensor holds floating-point numbers itself, rather than packed, quantised or sharded ones.

    Quantisers (torchao, quanto) have subclasses of tensors, which report a floating dtype.
    """
    plain = type(weight) in (Tensor, nn.Parameter)
    return plain and weight.is_floating_point() and weight.element_size() > 1


def placement(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for the experts of a layer: those it computes in, wherever its weights are kept.

    A layer that accelerate moves (its weight is on the meta device between calls) computes on its hook's execution
    device; a quantised layer computes in its ``compute_dtype``, or the dtype of the model's floating parameters.
    """
    weight = getattr(module, "weight", None)
    device = weight.device if isinstance(weight, Tensor) else next(model.parameters()).device
    device = _execution_device(getattr(module, "_hf_hook", None)) or device
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1:
        return device, weight.dtype
    stated = getattr(module, "compute_dtype", None)
    return device, stated if isinstance(stated, torch.dtype) else _model_dtype(model)


def input_device(model: nn.Module) -> torch.device:
    """The device where a model's inputs belong: that of its first weight, or where accelerate computes with it.

    Weights that accelerate offloads are on the meta device between calls.
    """
    first = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if first.type != "meta":
        return first
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    found = (_execution_device(hook) for hook in hooks if hook is not None)
    return next((device for device in found if device is not None), torch.device("cpu"))


def _execution_device(hook: Any) -> torch.device | None:
    """The device on which a hook of accelerate has its module compute."""
    device = getattr(hook, "execution_device", None)
    return torch.device(f"cuda:{device}") if isinstance(device, int) else device and torch.device(device)


def _model_dtype(model: nn.Module) -> torch.dtype:
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1)
    return next(kinds, torch.get_default_dtype())
