"""Give an expert the module and parameter names of one model if its file uses other names.

PEFT's files name the module that holds a fused parameter, plus ``base_layer`` for each further adapted parameter. Older
files have one pair of factors per expert of a mixture (MoE), since models then had one module per expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from spectr.adapters.adapter_config import WRAPPED, AdapterConfig
from spectr.adapters.expert import Expert, FactorShape
from spectr.adapters.saved_parts import SavedParts
from spectr.adapters.targets import Targets
from spectr.adapters.updates import ManyPairs, OnePair
from spectr.errors import AdapterError
from spectr.grouping import grouped


class Parameter(NamedTuple):
    """A parameter that an adapter may target by its name.

    Attributes:
        name: Name in the model.
        matrices: Number of matrices; 0 for a single matrix.
        inputs: Inputs of a matrix.
        outputs: Outputs of a matrix.
        layer: For the weight of a layer, the name that factors for it have here.
    """

    name: str
    matrices: int
    inputs: int
    outputs: int
    layer: str = ""


class Part(NamedTuple):
    """The place of an older model's module in a parameter.

    Attributes:
        parameter: The parameter that contains it.
        matrix: Index of the matrix.
        branch: Index among the modules that form this matrix.
        branches: Number of these modules.
    """

    parameter: Parameter
    matrix: int
    branch: int
    branches: tuple[str, ...]


class ParameterNames(Protocol):
    """What a model knows about its parameters."""

    def of(self, module: str) -> Sequence[Parameter]:
        """The parameters of a module that an adapter may target, in order; empty if there is no such module."""
        ...

    def part(self, module: str) -> Part | None:
        """The place of a module that older models had."""
        ...


def fused_for(expert: Expert, names: ParameterNames) -> Expert:
    """An expert whose fused parameters have their names in a model.

    Raises:
        AdapterError: The file's factors do not match the targeted parameters, or an adapter changes only some of the
            modules that form one matrix.
    """
    config, found = expert.config, {**expert.left_out, **expert.shapes}
    if config is None:
        return expert
    shapes: dict[str, FactorShape] = {}
    file_names: dict[str, str] = {}
    taken: set[str] = set()
    for module, wrapped in grouped((name.replace(WRAPPED, ""), name) for name in found).items():
        targeted = _parameters_for(expert, config, module, wrapped, names.of(module))
        for parameter, name in _levels(expert, module, wrapped, targeted).items() if targeted else ():
            place = parameter.layer or parameter.name
            shapes[place] = _wrapped_shape(expert, config, parameter, found[name])
            file_names[place] = expert.file_names.get(name, name)
            taken.add(name)
    parts = {name: part for name in expert.shapes if name not in taken and (part := names.part(name)) is not None}
    for parameter, modules in grouped((part.parameter, name) for name, part in parts.items()).items():
        here = {name: parts[name] for name in modules}
        shapes[parameter.name] = _gathered_shape(expert, parameter, here) if parameter.matrices else found[modules[0]]
    taken |= set(parts)
    if not taken:
        return expert
    _check_products(expert, [found[name] for name in taken])
    kept, left_out = ({n: s for n, s in each.items() if n not in taken} for each in (expert.shapes, expert.left_out))
    file_names |= {name: old for name, old in expert.file_names.items() if name not in taken}
    marked = {name: shape._replace(of_parameter=True) for name, shape in shapes.items()}
    shapes = dict(sorted({**kept, **marked}.items()))
    return replace(expert, shapes=shapes, left_out=left_out, file_names=file_names)


def _parameters_for(
    expert: Expert, config: AdapterConfig, module: str, wrapped: Sequence[str], parameters: Sequence[Parameter]
) -> list[Parameter]:
    """The module's parameters that the factors under its name are for."""
    targeted = [each for each in parameters if config.targets_parameter(each.name)]
    was_linear = len(parameters) == 1 and not (parameters[0].matrices or parameters[0].layer) and wrapped == [module]
    return list(parameters) if not targeted and was_linear and module in expert.shapes else targeted


def _check_products(expert: Expert, shapes: Sequence[FactorShape]) -> None:
    """Raise :class:`AdapterError` if parameters have more than factors, which PEFT refuses too."""
    kinds = sorted({kind for shape in shapes for kind in shape.parts.kinds})
    if kinds:
        raise AdapterError(
            f"expert '{expert.name}' adapts parameters with {', '.join(kinds)}",
            expected="plain LoRA, whose update is scale * B @ A, for parameters",
            do="retrain it without these settings, or adapt linear layers only",
        )


def _levels(expert: Expert, module: str, wrapped: Sequence[str], targeted: Sequence[Parameter]) -> dict[Parameter, str]:
    """The name of the factors of each parameter. PEFT wraps them in order; the last one has the module's name."""
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
        return given  # a linear layer
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
    """Shape of factors whose modules became matrices of a parameter."""
    found = expert.shapes
    branches = next(iter(parts.values())).branches
    present = {part.branch for part in parts.values()}
    if len(present) < len(branches):
        raise AdapterError(
            f"expert '{expert.name}' adapts {', '.join(branches[b] for b in sorted(present))} of MoE experts without "
            f"{', '.join(name for b, name in enumerate(branches) if b not in present)}; this model holds them in one "
            f"parameter, {parameter.name}",
            expected=f"factors for {' and '.join(branches)}",
            do="retrain it with all of these targets, or omit the adapter",
        )
    sizes = {part.branch: found[name].outputs for name, part in parts.items()}
    missing = [FactorShape(0, 0, sizes[branch], 0.0, "", "") for branch in range(len(branches))]
    rows = [[*missing] for _ in range(parameter.matrices)]
    for name, part in parts.items():
        rows[part.matrix][part.branch] = found[name]
    filled = [tuple(row) for row in rows]
    rank = max(sum(pair.rank for pair in row) for row in filled)
    inputs, outputs = next(found[name].inputs for name in parts), sum(sizes.values())
    layout = ManyPairs(filled, rank, inputs, outputs)
    return FactorShape(rank, inputs, outputs, 1.0, "", "", layout=layout, matrices=parameter.matrices)


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What a model knows about its modules' names.

    Attributes:
        modules: The names of all modules.
        renamed: Current names by the names of older versions.
        heads: Modules that PEFT's ``all-linear`` skips: the output head.
        parameters: Its parameters; ``None`` if these do not matter.
    """

    modules: Collection[str]
    renamed: Callable[[str], str] = lambda name: name
    heads: Collection[str] = frozenset()
    parameters: ParameterNames | None = None

    def of(self, module: str) -> str:
        """The name of a module in the model; unchanged if the model has no such module."""
        if module in self.modules:
            return module
        new = self.renamed(module)
        return new if new in self.modules else module


def named_for(expert: Expert, naming: Naming) -> Expert:
    """An expert with a model's module names, restricted to the modules that its configuration targets there.

    PEFT matches targets, ranks and scales with the model's names, whatever the names in the file are.

    Raises:
        AdapterError: Two modules in the file are one module of the model; or see :func:`fused_for`.
    """
    config, found = expert.config, {**expert.shapes, **expert.left_out}
    names = {old: naming.of(old) for old in found}
    if config is None:
        return expert
    counts = [Counter(names.values()), Counter(map(naming.of, expert.saved))]
    twice = [new for count_of in counts for new, count in count_of.items() if count > 1]
    if twice:
        raise AdapterError(
            f"expert '{expert.name}' has tensors of {twice[0]} twice: under this name and under an older one",
            expected="one set of tensors for a module",
            do="save the adapter again with PEFT",
        )
    shapes: dict[str, FactorShape] = {}
    left_out: dict[str, FactorShape] = {}
    for old, new in sorted(names.items(), key=lambda pair: pair[1]):
        shape, targeted = found[old], _targeted(config.targets, old, new, naming)
        if targeted:
            _check_rank(expert, old, new, shape.file_rank)
        place = shapes if targeted else left_out
        place[new] = shape._replace(scale=_scale(config, old, new, shape.file_rank, shape.scale))
    kept = {new: old for old, new in names.items() if new != old}
    saved: dict[str, SavedParts] = {}
    for old, parts in expert.saved.items():
        new, own = naming.of(old), parts.factors
        if own is not None:
            own = own._replace(scale=_scale(config, old, new, own.rank, own.scale))
            if not config.targets.tied and not _targeted(config.targets, old, new, naming):
                left_out[new] = FactorShape(own.rank, own.tokens, own.features, own.scale, own.key_A, own.key_B)
                own = None
            else:
                _check_rank(expert, old, new, own.rank)
        rest = replace(parts, factors=own)
        if rest.keys:
            saved[new] = rest
    named = replace(expert, shapes=shapes, saved=saved, left_out=left_out, file_names=kept)
    return named if naming.parameters is None else fused_for(named, naming.parameters)


def _targeted(targets: Targets, old: str, new: str, naming: Naming) -> bool:
    if targets.all_linear and new in naming.heads:
        return False
    if targets.tied and new in naming.heads:
        return True
    return targets.has(new) or (new != old and targets.lists(old) and targets.has(old))


def _scale(config: AdapterConfig, old: str, new: str, rank: int, scale: float) -> float:
    """The scale of a renamed module: by its new name, unless only the old name gives the rank in the file."""
    return config.scale_of(new) if new != old and config.rank_of(new) == rank else scale


def _check_rank(expert: Expert, old: str, new: str, rank: int) -> None:
    """Raise :class:`AdapterError` for a renamed module whose rank in the file no name gives; PEFT refuses it too."""
    config = expert.config
    if new == old or config is None or config.target_parameters or rank in (config.rank_of(old), config.rank_of(new)):
        return
    raise AdapterError(
        f"expert '{expert.name}': {old} has factors of rank {rank} but the configuration says rank "
        f"{config.rank_of(new)} for {new}",
        expected="factors of the rank in the configuration",
        do="save the adapter again with PEFT",
    )
