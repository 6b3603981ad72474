"""Experts without what general experts know, as adapters that any router composes; two readings of GenKnowSub."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from spectr.adapters import Factors
from spectr.adapters.write import common_settings, write_adapter
from spectr.errors import MergeError, SpectrError, collecting, raise_together
from spectr.folders import new_folder
from spectr.library import ExpertLibrary
from spectr.merging.lowrank import LowRank

Subtraction = Literal["genknowsub", "products"]


@torch.no_grad()
def residual_experts(
    library: ExpertLibrary, general: ExpertLibrary, out: str | Path, *, subtract: Subtraction = "genknowsub"
) -> ExpertLibrary:
    """Write every expert without the general ones into ``out/NAME``, and open the result.

    ``"genknowsub"``, as its authors and PEFT's ``general_adapter_paths`` do it: ``c_t (B_t - mean_g B_g)
    (A_t - mean_g A_g)``. This has cross terms that belong to no expert, and depends on how updates were split into
    factors. ``"products"``, what is meant by it: ``delta_t - mean_g delta_g``, exactly, of as many ranks as all have
    together.

    Args:
        library: The experts.
        general: Experts of what all tasks have in common, such as adapters trained on plain text.
        out: A new folder.
        subtract: Which of the two.

    Raises:
        MergeError: An expert is more than its factors, or factors differ in modules or sizes where they are subtracted
            from each other.

    Source: GenKnowSub (Bagherifard et al., 2025).
    """
    if subtract not in _SUBTRACTIONS:
        raise MergeError(f"subtract={subtract!r}", expected=f"one of {', '.join(_SUBTRACTIONS)}")
    _check(library, general, alike=subtract == "genknowsub")
    with new_folder(Path(out), MergeError, do="choose another folder") as folder, ExitStack() as files:
        theirs = [(general[name].shapes, files.enter_context(general[name].open())) for name in general]
        for name in library:
            expert, pairs = library[name], {}
            with expert.open() as read:
                for module in expert.shapes:
                    known = [other(module) for shapes, other in theirs if module in shapes]
                    pairs[module] = _SUBTRACTIONS[subtract](read(module), known, len(theirs))
            (folder / name).mkdir()
            write_adapter(folder / name, pairs, common_settings([expert]))
    return ExpertLibrary.from_adapters({name: str(Path(out) / name) for name in library})


def _of_factors(own: Factors, general: list[Factors], count: int) -> LowRank:
    A = own.A.float() - torch.stack([one.A.float() for one in general]).mean(0)
    B = own.B.float() - torch.stack([one.B.float() for one in general]).mean(0)
    return LowRank(B * own.scale, A)


def _of_products(own: Factors, general: list[Factors], count: int) -> LowRank:
    taken = [LowRank(one.B.float() * (-one.scale / count), one.A.float()) for one in general]
    return LowRank.joined([LowRank(own.B.float() * own.scale, own.A.float()), *taken])


_SUBTRACTIONS: dict[str, Callable[[Factors, list[Factors], int], LowRank]] = {
    "genknowsub": _of_factors,
    "products": _of_products,
}


def _check(library: ExpertLibrary, general: ExpertLibrary, *, alike: bool) -> None:
    """Raise :class:`MergeError`, with all faults, unless the experts can be subtracted from each other."""
    problems: list[SpectrError] = []
    experts = [some[name] for some in (library, general) for name in some]
    for expert in experts:
        with collecting(problems):
            expert.check_factors_alone("subtraction", MergeError)
    sizes = [{module: shape[:3] for module, shape in expert.shapes.items()} for expert in experts]
    for expert, own in zip(experts, sizes, strict=True):
        if alike and own != sizes[-1]:
            problems.append(
                MergeError(
                    f"'{expert.name}' and the general '{experts[-1].name}' have factors of different modules or sizes",
                    expected="adapters with the same modules and ranks, as their factors are subtracted",
                    do="subtract the products: subtract='products'",
                )
            )
    raise_together("the general experts cannot be subtracted", problems, MergeError)
