"""TIES: trim each update, elect a sign for each entry, take the mean of those that agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.merging.lowrank import LowRank
from spectr.merging.method import Site, check_settings, ones


def trim(delta: Float[Tensor, "M N"], density: float) -> Float[Tensor, "M N"]:
    """The ``density`` of the entries that are largest in magnitude, at least one of them; the others zero.

    Entries as large as the smallest of those that stay do so too.

    Args:
        delta: Any matrix.
        density: Share of the entries, above 0, at most 1.
    """
    if density == 1:
        return delta
    sizes = delta.abs()
    cut = sizes.numel() - max(1, int(density * sizes.numel()))
    return delta * (sizes >= sizes.reshape(-1).kthvalue(cut + 1).values)


def elect_and_mean(deltas: Sequence[Float[Tensor, "M N"]]) -> Float[Tensor, "M N"]:
    """For each entry the mean of those that have the sign of the entries' sum; zeros do not count.

    A sum of exactly zero counts as positive.

    Args:
        deltas: Matrices of one shape, at least one.
    """
    total = sum(deltas[1:], start=deltas[0])
    elected = torch.where(total < 0, -1.0, 1.0)
    merged, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta in deltas:
        agrees = delta.sign() == elected
        merged += delta * agrees
        agreeing += agrees
    return merged / agreeing.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Ties:
    """``delta = scale * elect_and_mean(trim(w_t delta_t))``.

    Trimmed are the products, each module by itself. Weights count before the election: weight 2 is the same as an
    update twice as large, and weight 0 the same as leaving the expert out.

    Attributes:
        density: Share of each update's entries that stay.
        scale: Lambda of the paper.

    Source: TIES-Merging (Yadav et al., 2023), section 4; the defaults are those it recommends without validation data.
    """

    name: ClassVar[str] = "ties"
    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, density=self.density, scale=self.scale)

    def weights(self, given: Sequence[float] | None, count: int) -> tuple[float, ...]:
        """See :class:`spectr.merging.Method`; 1 each where none are given."""
        return ones(given, count)

    def merge(self, deltas: Sequence[LowRank], site: Site) -> Float[Tensor, "O I"]:
        """See :class:`spectr.merging.Method`."""
        return self.scale * elect_and_mean([trim(delta.dense(), self.density) for delta in deltas])
