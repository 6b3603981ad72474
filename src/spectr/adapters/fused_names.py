"""An expert of a model with fused parameters: the factors of its file by the names of the parameters that they adapt.

PEFT's files name the module that holds a parameter, and ``base_layer`` once for each further parameter of it that is
adapted. Older files have a pair of factors for each expert of a mixture (MoE), as models had a module for it then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from spectr.adapters.config import WRAPPED, AdapterConfig
from spectr.adapters.expert import Expert, FactorShape
from spectr.adapters.fused import ManyPairs, OnePair, Pair
from spectr.errors import AdapterError
from spectr.grouping import grouped


class Parameter(NamedTuple):
    """A parameter that is no weight of a linear layer.

    Attributes:
        name: In the model.
        matrices: How many it holds; 0 for a matrix.
        inputs: Of a matrix.
        outputs: Of a matrix.
    """

    name: str
    matrices: int
    inputs: int
    outputs: int


class Part(NamedTuple):
    """What became of the weight of a module of older models.

    Attributes:
        parameter: The parameter that it is a part of.
        matrix: Of which matrix.
        branch: Of the modules that became this matrix, which one.
        branches: How many these are.
    """

    parameter: Parameter
    matrix: int
    branch: int
    branches: tuple[str, ...]


class ParameterNames(Protocol):
    """What a model says of its parameters."""

    def of(self, module: str) -> Sequence[Parameter]:
        """The parameters of a module that is no linear layer, in their order; none where there is no such module."""
        ...

    def part(self, module: str) -> Part | None:
        """What became of a module that older models had."""
        ...


def fused_for(expert: Expert, names: ParameterNames) -> Expert:
    """An expert whose fused parameters go by their names in a model.

    Raises:
        AdapterError: The factors in the file are not those of the parameters that the configuration targets, or of a
            matrix made of several modules only some are adapted.
    """
    config, found = expert.config, {**expert.left_out, **expert.shapes}
    if config is None:
        return expert
    shapes: dict[str, FactorShape] = {}
    file_names: dict[str, str] = {}
    taken: set[str] = set()
    for module, wrapped in grouped((name.replace(WRAPPED, ""), name) for name in found).items():
        targeted = _targeted(expert, config, module, wrapped, names.of(module))
        for parameter, name in _levels(expert, module, wrapped, targeted).items() if targeted else ():
            shapes[parameter.name] = _wrapped_shape(expert, config, parameter, found[name])
            file_names[parameter.name] = expert.file_names.get(name, name)
            taken.add(name)
    parts = {name: part for name in expert.shapes if name not in taken and (part := names.part(name)) is not None}
    for parameter, modules in grouped((part.parameter, name) for name, part in parts.items()).items():
        here = {name: parts[name] for name in modules}
        shapes[parameter.name] = _gathered_shape(expert, parameter, here) if parameter.matrices else found[modules[0]]
    taken |= set(parts)
    if not taken:
        return expert
    _check_products(expert, [found[name] for name in taken])
    kept, left_out = ({n: s for n, s in held.items() if n not in taken} for held in (expert.shapes, expert.left_out))
    file_names |= {name: old for name, old in expert.file_names.items() if name not in taken}
    marked = {name: shape._replace(of_parameter=True) for name, shape in shapes.items()}
    shapes = dict(sorted({**kept, **marked}.items()))
    return replace(expert, shapes=shapes, left_out=left_out, file_names=file_names)


def _targeted(
    expert: Expert, config: AdapterConfig, module: str, wrapped: Sequence[str], parameters: Sequence[Parameter]
) -> list[Parameter]:
    """Those of a module's parameters that the factors under its name are for."""
    targeted = [each for each in parameters if config.targets_parameter(each.name)]
    was_linear = len(parameters) == 1 and not parameters[0].matrices and wrapped == [module]
    return list(parameters) if not targeted and was_linear and module in expert.shapes else targeted


def _check_products(expert: Expert, shapes: Sequence[FactorShape]) -> None:
    """Raise :class:`AdapterError` where parameters have more than factors, which PEFT refuses too."""
    kinds = sorted({kind for shape in shapes for kind in shape.parts.kinds})
    if kinds:
        raise AdapterError(
            f"expert '{expert.name}' adapts parameters with {', '.join(kinds)}",
            expected="plain LoRA, whose update is scale * B @ A, for parameters",
            do="retrain it without these settings, or with linear layers alone",
        )


def _levels(expert: Expert, module: str, wrapped: Sequence[str], targeted: Sequence[Parameter]) -> dict[Parameter, str]:
    """By parameter the name of its factors: PEFT wraps them in their order, so that the last one has the module's."""
    levels = [module + WRAPPED * depth for depth in range(len(targeted))]
    if sorted(levels) != sorted(wrapped):
        raise AdapterError(
            f"expert '{expert.name}' has {len(wrapped)} pairs of factors for parameters of {module}, and its "
            f"configuration targets {', '.join(each.name for each in targeted)}",
            expected="a pair of factors for each parameter in target_parameters",
            do="save the adapter again with PEFT, with the model that it was trained on",
        )
    return dict(zip(targeted, reversed(levels), strict=True))


def _wrapped_shape(expert: Expert, config: AdapterConfig, parameter: Parameter, given: FactorShape) -> FactorShape:
    if not config.targets_parameter(parameter.name):
        return given  # a linear layer's
    rank, matrices = config.rank_of(parameter.name), max(1, parameter.matrices)
    if given.file_rank != rank * matrices:
        raise AdapterError(
            f"expert '{expert.name}': {parameter.name} has factors of rank {given.rank}",
            expected=f"{rank} for each of its {matrices} matrices" if parameter.matrices else f"rank {rank}",
            do="load the base model that the adapter was trained on, or save the adapter again with PEFT",
        )
    layout = OnePair(given.key_A, given.key_B, matrices) if parameter.matrices else None
    scale = config.scale_of(parameter.name)
    return given._replace(rank=rank, scale=scale, layout=layout, matrices=parameter.matrices)


def _gathered_shape(expert: Expert, parameter: Parameter, parts: Mapping[str, Part]) -> FactorShape:
    """Of the factors of modules that became matrices of a parameter."""
    found = expert.shapes
    branches = next(iter(parts.values())).branches
    present = {part.branch for part in parts.values()}
    if len(present) < len(branches):
        raise AdapterError(
            f"expert '{expert.name}' adapts {', '.join(branches[b] for b in sorted(present))} of the experts of a "
            f"mixture without {', '.join(name for b, name in enumerate(branches) if b not in present)}, which this "
            f"model has in one parameter, {parameter.name}",
            expected=f"factors for {' and '.join(branches)}",
            do="retrain it with all of these targets, or leave the adapter out",
        )
    rows = [[Pair("", "", 0, 0, 0, 0.0)] * len(branches) for _ in range(parameter.matrices)]
    sizes = {part.branch: found[name].outputs for name, part in parts.items()}
    for name, part in parts.items():
        shape = found[name]
        rows[part.matrix][part.branch] = Pair(
            shape.key_A, shape.key_B, shape.rank, shape.inputs, shape.outputs, shape.scale
        )
    filled = [tuple(p if p.rank else p._replace(outputs=sizes[b]) for b, p in enumerate(row)) for row in rows]
    rank = max(sum(pair.rank for pair in row) for row in filled)
    inputs, outputs = next(found[name].inputs for name in parts), sum(sizes.values())
    layout = ManyPairs(filled, rank, inputs, outputs)
    return FactorShape(rank, inputs, outputs, 1.0, "", "", layout=layout, matrices=parameter.matrices)
