"""Merge experts by a recipe, one module at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spectr.adapters import Factors
from spectr.errors import MergeError, collecting, raise_together
from spectr.library import ExpertLibrary
from spectr.merging.lowrank import LowRank, cut_dense, cut_factors
from spectr.merging.method import Site
from spectr.merging.recipe import Recipe, expert_faults, size_faults
from spectr.merging.subtract import SUBTRACTIONS, of_products
from spectr.spectral.precision import without_autocast

Progress = Callable[[int, int], None]


class MergedModule(NamedTuple):
    """One merged module: its name, the merged update, and the sum of the experts' ranks.

    For a parameter with several matrices, it is one of them, ``matrix``.
    """

    module: str
    delta: LowRank | Tensor
    rank: int
    matrix: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class MergedAdapter:
    """A merge as an adapter.

    Attributes:
        recipe: How it was made.
        deltas: Factors by module name, in alphabetical order, without modules whose merged update is zero.
        energy: By module name, the share of ``||delta||^2`` (Frobenius) of the exact merge that the factors keep.
    """

    recipe: Recipe
    deltas: Mapping[str, LowRank]
    energy: Mapping[str, float]


@without_autocast()
def merge_adapter(
    library: ExpertLibrary,
    recipe: Recipe,
    *,
    rank: int | None = None,
    energy: float | None = None,
    progress: Progress = lambda done, total: None,
) -> MergedAdapter:
    """Merge experts into one adapter, in memory.

    Sums of updates (average, linear, products), genknowsub and KnOTS have exact factors; the rank of a sum is the sum
    of the experts' ranks. The other methods compute dense updates, and the best approximation of a rank is kept.

    Args:
        library: The library of the experts.
        recipe: The experts, and how to merge them.
        rank: Largest rank of a module. ``None`` keeps all of an exact merge, and for a dense one the sum of the
            experts' ranks in the module.
        energy: Keep the fewest directions with at least this share of ``||delta||^2``; ``rank`` still limits them.
        progress: Called after each module with (modules done, total).

    Raises:
        MergeError: Experts are unknown or of different base models, a size is out of range, or the merge is zero.
        AdapterError: An expert's file cannot be read.
    """
    faults = [*size_faults(rank, energy), *expert_faults(library, recipe.experts, recipe.subtract, recipe.method.name)]
    for name in () if faults else (*recipe.experts, *recipe.subtract):
        with collecting(faults):
            library[name].check_factors_alone("a merged adapter", MergeError)
    raise_together("the experts cannot be merged", faults, MergeError)
    deltas, kept = {}, {}
    for module, delta, full_rank, _ in merged_modules(library, recipe, progress):
        if isinstance(delta, LowRank):
            cut = cut_factors(delta, rank, energy)
        else:
            cut = cut_dense(delta, full_rank if rank is None and energy is None else rank, energy)
        if cut.delta.rank:
            deltas[module], kept[module] = cut
    if not deltas:
        raise MergeError(
            f"the merge of {', '.join(recipe.experts)} is zero everywhere",
            do="check the weights and --subtract",
        )
    return MergedAdapter(recipe=recipe, deltas=deltas, energy=kept)


@torch.no_grad()
def merged_modules(
    library: ExpertLibrary, recipe: Recipe, progress: Progress = lambda done, total: None
) -> Iterator[MergedModule]:
    """Every module that an expert of the recipe adapts, merged, in alphabetical order; holds one at a time.

    Yields:
        Name, exact update (factors, or dense (outputs, inputs) float32), and the sum of ranks. A parameter with several
            matrices yields them in order.
    """
    experts = {name: library[name] for name in (*recipe.experts, *recipe.subtract)}
    sizes = {m: (s.outputs, s.inputs) for expert in experts.values() for m, s in expert.shapes.items()}
    with ExitStack() as files:
        readers = {name: files.enter_context(expert.open()) for name, expert in experts.items()}
        for done, module in enumerate(sorted(sizes), start=1):
            adapted = [name for name, expert in experts.items() if module in expert.shapes]
            factors = {name: _matrices(readers[name](module)) for name in adapted}
            matrices = max(experts[name].shapes[module].matrices for name in adapted)
            for matrix in range(max(1, matrices)):
                here = {name: each[matrix] for name, each in factors.items()}
                updates = _weighted(here, recipe, LowRank.zero(*sizes[module]))
                place = f"{module}[{matrix}]" if matrices else module
                merged = recipe.method.merge(updates, Site(place, recipe.experts))
                rank = sum(update.rank for update in updates)
                yield MergedModule(module, merged, rank, matrix if matrices else None)
            progress(done, len(sizes))


def _matrices(factors: Factors) -> list[Factors]:
    """The factors of each matrix of a parameter; those of a linear layer unchanged."""
    A, B, scale = factors
    return [factors] if A.ndim == 2 else [Factors(*pair, scale) for pair in zip(A, B, strict=True)]


def _weighted(factors: Mapping[str, Factors], recipe: Recipe, zero: LowRank) -> list[LowRank]:
    """Each expert's weighted update minus the general ones' mean; ``factors`` lacks experts that do not adapt this."""
    nothing = Factors(zero.A, zero.B, 1.0)
    general = [factors[name] for name in recipe.subtract if name in factors]
    subtract = SUBTRACTIONS.get(recipe.method.name, of_products)
    share = recipe.strength / max(1, len(recipe.subtract))
    return [
        subtract(factors.get(name, nothing), general, share).times(weight)
        for name, weight in zip(recipe.experts, recipe.effective_weights, strict=True)
    ]


def spread(values: Mapping[str, float]) -> tuple[float, float, float]:
    """Minimum, median and maximum of some numbers; NaN if there are none."""
    ordered = sorted(values.values()) or [math.nan]
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]
