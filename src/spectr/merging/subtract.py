"""Subtract general experts from an expert, in the two ways that are called GenKnowSub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from spectr.adapters import Expert, Factors
from spectr.errors import MergeError
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
