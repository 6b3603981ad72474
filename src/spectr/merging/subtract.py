"""Subtract general experts from experts, in the two ways that are called GenKnowSub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from spectr.adapters import Expert, Factors
from spectr.adapters.write import common_settings, write_adapter
from spectr.errors import MergeError, SpectrError, collecting, raise_together
from spectr.folders import new_folder
from spectr.library import ExpertLibrary
from spectr.merging.lowrank import LowRank


def of_factors(own: Factors, general: Sequence[Factors], share: float) -> LowRank:
    """``c_t (B_t - share * sum_g B_g) (A_t - share * sum_g A_g)``, for factors of the same sizes."""
    A, B = own.A.float(), own.B.float()
    for one in general:
        A, B = A - share * one.A.float(), B - share * one.B.float()
    return LowRank(B * own.scale, A)


def of_products(own: Factors, general: Sequence[Factors], share: float) -> LowRank:
    """``delta_t - share * sum_g delta_g``, of as many ranks as all have together."""
    return LowRank.joined([LowRank.of(own), *(LowRank.of(one).times(-share) for one in general)])


SUBTRACTIONS: dict[str, Callable[[Factors, Sequence[Factors], float], LowRank]] = {
    "genknowsub": of_factors,
    "products": of_products,
}


def factor_faults(experts: Sequence[Expert]) -> Iterator[MergeError]:
    """Why the factors of these experts cannot be subtracted from each other; the last one is general."""
    sizes = [{module: shape[:3] for module, shape in expert.shapes.items()} for expert in experts]
    for expert, own in zip(experts, sizes, strict=True):
        if own != sizes[-1]:
            yield MergeError(
                f"'{expert.name}' and the general '{experts[-1].name}' have factors of different modules or sizes",
                expected="adapters with the same modules and ranks, as their factors are subtracted",
                do="subtract the products: subtract='products', or --method products",
            )


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
    if subtract not in SUBTRACTIONS:
        raise MergeError(f"subtract={subtract!r}", expected=f"one of {', '.join(SUBTRACTIONS)}")
    experts, taken = ([some[name] for name in some] for some in (library, general))
    problems: list[SpectrError] = list(factor_faults([*experts, *taken])) if subtract == "genknowsub" else []
    for expert in (*experts, *taken):
        with collecting(problems):
            expert.check_factors_alone("subtraction", MergeError)
    raise_together("the general experts cannot be subtracted", problems, MergeError)
    with new_folder(Path(out), MergeError, do="choose another folder") as folder, ExitStack() as files:
        theirs = [(expert.shapes, files.enter_context(expert.open())) for expert in taken]
        for expert in experts:
            pairs = {}
            with expert.open() as read:
                for module in expert.shapes:
                    known = [other(module) for shapes, other in theirs if module in shapes]
                    pairs[module] = SUBTRACTIONS[subtract](read(module), known, 1 / len(theirs))
            (folder / expert.name).mkdir()
            write_adapter(folder / expert.name, pairs, common_settings([expert]))
    return ExpertLibrary.from_adapters({name: str(Path(out) / name) for name in library})
