"""DARE: drop random entries of each update, and scale up the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.merging.lowrank import LowRank
from spectr.merging.method import Site, check_settings, ones, shares
from spectr.spectral.sparsify import drop, elect_and_mean


def _dropped(deltas: Sequence[LowRank], site: Site, density: float, seed: int) -> list[Tensor]:
    return [
        drop(delta.dense(), density, seed=seed, expert=name, module=site.module)
        for name, delta in zip(site.experts, deltas, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Dare:
    """``delta = sum_t w_t drop(delta_t)``.

    Attributes:
        density: Share of each update's entries that are kept; the paper's drop rate is ``1 - density``.
        seed: Seed of the random masks.

    Source: DARE (Yu et al., 2024), before averaging or task arithmetic. It searches drop rates from 0.1 to 0.9 and
    recommends none; the authors of KnOTS use 0.8 for LoRA experts of Llama-3-8B.
    """

    name: ClassVar[str] = "dare"
    density: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, density=self.density)

    def weights(self, given: Sequence[float] | None, count: int) -> tuple[float, ...]:
        """See :class:`spectr.merging.Method`; by default 1 / E each."""
        return shares(given, count)

    def merge(self, deltas: Sequence[LowRank], site: Site) -> Float[Tensor, "O I"]:
        """See :class:`spectr.merging.Method`."""
        return torch.stack(_dropped(deltas, site, self.density, self.seed)).sum(0)


@dataclass(frozen=True, kw_only=True)
class DareTies:
    """``delta = scale * elect_and_mean(drop(w_t delta_t))``: dropping replaces TIES's trimming.

    Attributes:
        density: Share of each update's entries that are kept; the paper's drop rate is ``1 - density``.
        scale: Lambda of TIES.
        seed: Seed of the random masks.

    Source: DARE (Yu et al., 2024) with TIES-Merging (Yadav et al., 2023); the drop rate as in :class:`Dare`.
    """

    name: ClassVar[str] = "dare-ties"
    density: float = 0.2
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, density=self.density, scale=self.scale)

    def weights(self, given: Sequence[float] | None, count: int) -> tuple[float, ...]:
        """See :class:`spectr.merging.Method`; by default 1 each."""
        return ones(given, count)

    def merge(self, deltas: Sequence[LowRank], site: Site) -> Float[Tensor, "O I"]:
        """See :class:`spectr.merging.Method`."""
        return self.scale * elect_and_mean(_dropped(deltas, site, self.density, self.seed))
