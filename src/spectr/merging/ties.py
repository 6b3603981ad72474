"""TIES: trim each update, elect a sign for each entry, take the mean of the entries that agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from spectr.merging.lowrank import LowRank
from spectr.merging.method import Site, check_settings, ones
from spectr.spectral.sparsify import elect_and_mean, trim


def ties_of(deltas: Sequence[Float[Tensor, "M N"]], density: float) -> Float[Tensor, "M N"]:
    """TIES for matrices of one shape: each is trimmed as a whole, signs are elected, entries that agree are averaged.

    Args:
        deltas: At least one.
        density: Share of each matrix's entries that are kept.
    """
    return elect_and_mean([trim(delta.flatten(), density) for delta in deltas]).view_as(deltas[0])


@dataclass(frozen=True, kw_only=True)
class Ties:
    """``delta = scale * elect_and_mean(trim(w_t delta_t))``.

    The products are trimmed, each module separately. Weights are applied before the election: weight 2 equals an update
    twice as large, and weight 0 equals omitting the expert.

    Attributes:
        density: Share of each update's entries that are kept.
        scale: The paper's lambda.

    Source: TIES-Merging (Yadav et al., 2023), section 4; the defaults are those it recommends without validation data.
    """

    name: ClassVar[str] = "ties"
    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, density=self.density, scale=self.scale)

    def weights(self, given: Sequence[float] | None, count: int) -> tuple[float, ...]:
        """See :class:`spectr.merging.Method`; by default 1 each."""
        return ones(given, count)

    def merge(self, deltas: Sequence[LowRank], site: Site) -> Float[Tensor, "O I"]:
        """See :class:`spectr.merging.Method`."""
        return self.scale * ties_of([delta.dense() for delta in deltas], self.density)
