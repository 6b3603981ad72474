"""What to merge and how, and all that can be wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectr.adapters import Expert
from spectr.errors import (
    MergeError,
    SpectrError,
    collecting,
    did_you_mean,
    raise_together,
    range_faults,
    some_of,
)
from spectr.folders import check_new_folder
from spectr.library import ExpertLibrary
from spectr.merging.method import Method, get_method
from spectr.merging.subtract import SUBTRACTIONS, factor_faults
from spectr.merging.ties import Ties
from spectr.shipped import open_library

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which experts to merge, and how.

    Attributes:
        experts: Their names, in the order of the weights.
        method: The method.
        weights: One number per expert; by default the method's own.
        subtract: General experts. The mean of their updates is first subtracted from each expert's update.
        strength: Factor of the subtraction: ``delta_t - strength * mean(delta_general)``.
    """

    experts: tuple[str, ...]
    method: Method = field(default_factory=Ties)
    weights: tuple[float, ...] | None = None
    subtract: tuple[str, ...] = ()
    strength: float = 1.0

    def __post_init__(self) -> None:
        faults = recipe_faults(self.experts, self.method, self.weights, self.subtract, self.strength)
        raise_together("the experts cannot be merged", faults, MergeError)

    @property
    def effective_weights(self) -> tuple[float, ...]:
        """One number per expert, by default the method's own."""
        return self.method.weights(self.weights, len(self.experts))


def make_recipe(
    library: ExpertLibrary | None,
    experts: Sequence[str],
    method: str = Ties.name,
    options: Mapping[str, Any] | None = None,
    *,
    weights: Sequence[float] | None = None,
    subtract: Sequence[str] = (),
    strength: float = 1.0,
    problems: Iterable[SpectrError] = (),
) -> Recipe:
    """Make a recipe from a method's name and options; checks everything at once.

    Args:
        library: A library that knows the experts; ``None`` if it could not be opened.
        experts: Names.
        method: Name of a method.
        options: Its settings.
        weights: See :class:`Recipe`.
        subtract: See :class:`Recipe`.
        strength: See :class:`Recipe`.
        problems: Problems with the rest of the request, which are raised together.

    Raises:
        MergeError: Lists everything that is wrong.
    """
    found = list(problems)
    made: Method | None = None
    with collecting(found):
        made = get_method(method, **(options or {}))
    numbers = tuple(weights) if weights is not None else None
    found += recipe_faults(experts, made, numbers, subtract, strength)
    found += expert_faults(library, experts, subtract, method) if library is not None else []
    raise_together("nothing was merged", found, MergeError)
    assert made is not None
    return Recipe(experts=tuple(experts), method=made, weights=numbers, subtract=tuple(subtract), strength=strength)


def recipe_faults(
    experts: Sequence[str],
    method: Method | None,
    weights: Sequence[float] | None,
    subtract: Sequence[str],
    strength: float,
) -> list[SpectrError]:
    """What is wrong with a recipe itself; ``method`` is ``None`` if that is wrong already."""
    faults: list[SpectrError] = []
    if not experts:
        faults.append(MergeError("no experts were named", expected="at least one expert"))
    faults += _name_faults(experts, subtract)
    if weights is not None:
        faults += _weight_faults(experts, weights)
    if not (math.isfinite(strength) and strength != 0):
        faults.append(MergeError(f"strength={strength}", expected="a finite number that is not 0"))
    if method is not None and experts:
        with collecting(faults):
            method.weights(weights, len(experts))
    name = "" if method is None else method.name
    if name in SUBTRACTIONS and not subtract:
        faults.append(MergeError(f"method '{name}' needs a general expert", do="name one: --subtract GENERAL"))
    if name == "genknowsub" and strength != 1:
        faults.append(
            MergeError("method 'genknowsub' has no strength", do="omit --strength, or use the method 'products'")
        )
    return faults


def _name_faults(experts: Sequence[str], subtract: Sequence[str]) -> Iterator[MergeError]:
    for names, what in ((experts, "merged"), (subtract, "subtracted")):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        if twice:
            yield MergeError(
                f"{what} more than once: {', '.join(twice)}", do="name each expert once, and give it a weight"
            )
    both = sorted(set(experts) & set(subtract))
    if both:
        yield MergeError(f"both merged and subtracted: {', '.join(both)}", do="remove it from one of them")


def _weight_faults(experts: Sequence[str], weights: Sequence[float]) -> Iterator[MergeError]:
    if experts and len(weights) != len(experts):
        yield MergeError(
            f"{len(weights)} weight{'s' * (len(weights) != 1)} for {len(experts)} experts",
            expected="one number for each expert, in the same order",
            do=f"pass {len(experts)} numbers, for {some_of(experts, _SHOWN)}",
        )
    if not all(map(math.isfinite, weights)) or not any(weights):
        yield MergeError(f"weights {', '.join(map(str, weights))}", expected="finite numbers that are not all 0")


def expert_faults(
    library: ExpertLibrary, names: Sequence[str], subtract: Sequence[str] = (), method: str = ""
) -> list[SpectrError]:
    """Names that the library does not have, experts that cannot be read, and modules or factors whose sizes differ."""
    faults: list[SpectrError] = []
    experts: list[Expert] = []
    for name in dict.fromkeys([*names, *subtract]):
        if name not in library:
            faults.append(MergeError(f"unknown expert '{name}'", do=did_you_mean(name, library.names)))
            continue
        with collecting(faults):
            expert = library[name]
            expert.check_plain("merging", MergeError, parameters=True)
            experts.append(expert)
    faults += _size_faults(experts)
    if method == "genknowsub" and subtract and not faults:
        faults += factor_faults(experts)
    return faults


def _size_faults(experts: Sequence[Expert]) -> Iterator[MergeError]:
    first: dict[str, Expert] = {}
    for expert in experts:
        for module, shape in expert.shapes.items():
            other = first.setdefault(module, expert)
            theirs = other.shapes[module]
            if (shape.inputs, shape.outputs) != (theirs.inputs, theirs.outputs):
                yield MergeError(
                    f"experts '{other.name}' and '{expert.name}' are for different base models: {module} is "
                    f"{theirs.inputs} -> {theirs.outputs} in one, {shape.inputs} -> {shape.outputs} in the other",
                    expected="experts of one base model",
                    do="remove one of them",
                )
                break


def read_plan(
    library: Path | None,
    experts: Sequence[str],
    out: Path,
    *,
    method: str,
    options: Mapping[str, Any],
    weights: str | None = None,
    subtract: Sequence[str] = (),
    strength: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    into_base: bool = False,
    model: str | None = None,
    dtype: str | None = None,
) -> tuple[ExpertLibrary, Recipe]:
    """The library and the recipe of a merge, after checking the whole request.

    Args:
        library: Folder of the experts; the shipped ones by default.
        experts: Their names, in the order of the weights.
        out: Folder for the result.
        method: Name of a method.
        options: Its settings.
        weights: Numbers, separated by commas.
        subtract: See :class:`Recipe`.
        strength: See :class:`Recipe`; 1 by default.
        rank: For an adapter.
        energy: For an adapter.
        into_base: Whether the result is a whole model instead of an adapter.
        model: For a whole model.
        dtype: For a whole model.

    Raises:
        SpectrError: Lists everything that is wrong.
    """
    problems = size_faults(rank, energy)
    for option, value, of, used in (
        ("--model", model, "--into-base", into_base),
        ("--dtype", dtype, "--into-base", into_base),
        ("--strength", strength, "--subtract", bool(subtract)),
    ):
        if value is not None and not used:
            problems.append(MergeError(f"{option} has no effect without {of}", do=f"remove it, or add {of}"))
    if into_base and (rank is not None or energy is not None):
        problems.append(MergeError("--rank and --energy have no effect with --into-base", do="remove them"))
    opened, numbers = None, None
    with collecting(problems):
        check_new_folder(out, MergeError)
    with collecting(problems):
        opened = open_library(library)
    with collecting(problems):
        numbers = _numbers(weights)
    recipe = make_recipe(
        opened,
        experts,
        method,
        options,
        weights=numbers,
        subtract=subtract,
        strength=1.0 if strength is None else strength,
        problems=problems,
    )
    assert opened is not None
    return opened, recipe


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise MergeError(f"--weights {text}", expected='numbers separated by commas: "1,0.5"') from None


def size_faults(rank: int | None, energy: float | None) -> list[SpectrError]:
    """What is wrong with the size limits of an adapter."""
    return [
        *range_faults(MergeError, "a rank of at least 1", lambda r: r >= 1, rank=rank),
        *range_faults(MergeError, "a share of the energy above 0, at most 1", lambda e: 0 < e <= 1, energy=energy),
    ]
