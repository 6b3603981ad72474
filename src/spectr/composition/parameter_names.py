"""Names of a model's parameters, and the places of older versions' modules in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn

from spectr.adapters.naming import Parameter, Part
from spectr.layers.linear_layers import features, returns_more


class _Converter(NamedTuple):
    """A conversion of several weights of a checkpoint into one parameter."""

    sources: tuple[str, ...]
    rename: Callable[[str], tuple[str, str | None]]


class ModelParameters:
    """The parameters of a model; see :class:`spectr.adapters.naming.ParameterNames`.

    Args:
        model: The model, composed or not.

    Source: ``transformers.conversion_mapping`` for modules of older models.
    """

    def __init__(self, model: nn.Module):
        self._model, self._modules = model, dict(model.named_modules())

    def of(self, module: str) -> Sequence[Parameter]:
        """See :class:`spectr.adapters.naming.ParameterNames`."""
        holder = self._modules.get(module)
        if holder is None:
            return ()
        linear = isinstance(holder, nn.Linear) or features(holder) is not None
        if isinstance(holder, nn.Embedding) or (linear and not returns_more(holder)):
            return _weight_of(module, holder)
        holder = getattr(holder, "base", holder)
        named = ((f"{module}.{name}", weight) for name, weight in holder.named_parameters(recurse=False))
        transposed = bool(getattr(holder, "is_transposed", False))
        return [_parameter(name, weight.shape, transposed) for name, weight in named if weight.ndim in (2, 3)]

    def part(self, module: str) -> Part | None:
        """See :class:`spectr.adapters.naming.ParameterNames`."""
        if module in self._modules:
            return None
        key = f"{module}.weight"
        for rename in renamings(self._transforms):
            key = rename(key)
        for converter in self._converters:
            name, source = converter.rename(key)
            if source is not None:
                return self._part(key, name, converter.sources.index(source), converter.sources)
        holder, _, _ = key.rpartition(".")
        found = [each for each in self.of(holder) if each.name == key and not (each.matrices or each.layer)]
        return Part(found[0], 0, 0, (module.rpartition(".")[2],)) if found else None

    def _part(self, key: str, name: str, branch: int, sources: tuple[str, ...]) -> Part | None:
        parameter = next((each for each in self.of(name.rpartition(".")[0]) if each.name == name), None)
        numbers = [int(part) for part in key.split(".") if part.isdigit()]
        if parameter is None or not numbers or numbers[-1] >= parameter.matrices:
            return None
        return Part(parameter, numbers[-1], branch, tuple(source.split(".")[-2] for source in sources))

    @cached_property
    def _transforms(self) -> list[Any]:
        return transforms_of(self._model)

    @cached_property
    def _converters(self) -> list[_Converter]:
        """Conversions that stack the weights of MoE experts, or concatenate one expert's weights by rows."""
        kinds = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
        return [
            _Converter(tuple(each.source_patterns), each.rename_source_key)
            for each in self._transforms
            if [type(step).__name__ for step in getattr(each, "operations", ())] in kinds
        ]


def transforms_of(model: Any) -> list[Any]:
    """What transformers does with the weights of a checkpoint of this model; nothing for other models."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4
        return []
    return list(get_model_conversion_mapping(model))


def renamings(transforms: Sequence[Any]) -> list[Callable[[str], str]]:
    """Those that only rename a weight, as functions of its name."""
    found = [each.rename_source_key for each in transforms if not hasattr(each, "operations")]
    return [lambda key, rename=rename: rename(key)[0] for rename in found]


def _weight_of(module: str, layer: Any) -> list[Parameter]:
    """The weight of a layer, whose update is the layer's own; but not that of a Conv1D, which is transposed."""
    name, weight = f"{module}.weight", getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return []
    return [_parameter(name, weight.shape, False)._replace(layer=name if hasattr(layer, "nf") else module)]


def _parameter(name: str, shape: Sequence[int], transposed: bool) -> Parameter:
    if len(shape) == 2:
        return Parameter(name, 0, shape[1], shape[0])
    inputs, outputs = shape[1:] if transposed else reversed(shape[1:])
    return Parameter(name, shape[0], inputs, outputs)
