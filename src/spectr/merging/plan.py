"""What to merge, checked before anything is read or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectr.errors import MergeError, collecting
from spectr.folders import check_new_folder
from spectr.library import ExpertLibrary
from spectr.merging.merge import size_faults
from spectr.merging.recipe import Recipe, make_recipe
from spectr.shipped import open_library


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
