"""Policies that pick the expert to remove from a full cache."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.registry import Registry, entry

Context = Float[Tensor, " D"]


class EvictionPolicy(Protocol):
    """Records requests, and picks the expert that is least likely to be needed soon."""

    def used(self, expert: str, context: Context | None) -> None:
        """Record a request for an expert.

        Args:
            expert: The expert's name.
            context: What is known about the prompt, (D,) float32, or ``None``.
        """

    def victim(self, resident: Collection[str]) -> str:
        """The expert to remove, one of these."""
        ...


class Lru:
    """Removes the expert that was not used for the longest time."""

    def __init__(self) -> None:
        self._clock = 0
        self._last: dict[str, int] = {}

    def used(self, expert: str, context: Context | None) -> None:
        """See :class:`EvictionPolicy`."""
        self._clock += 1
        self._last[expert] = self._clock

    def victim(self, resident: Collection[str]) -> str:
        """See :class:`EvictionPolicy`."""
        return min(resident, key=lambda expert: self._last.get(expert, 0))


class Lfu:
    """Removes the expert that was used least often. Ties go to the one that was not used for the longest time.

    Args:
        half_life: Number of uses (of any expert) after which a use counts half. With ``None``, all uses count equally.
    """

    def __init__(self, half_life: float | None = None) -> None:
        self._growth = 1.0 if half_life is None else 2 ** (1 / half_life)
        self._weight = 1.0
        self._clock = 0
        self._count: dict[str, float] = {}
        self._last: dict[str, int] = {}

    def used(self, expert: str, context: Context | None) -> None:
        """See :class:`EvictionPolicy`."""
        self._clock += 1
        self._weight *= self._growth  # growing weights discount old uses without changing them
        if self._weight > 1e100:
            self._count = {name: count / self._weight for name, count in self._count.items()}
            self._weight = 1.0
        self._count[expert] = self._count.get(expert, 0.0) + self._weight
        self._last[expert] = self._clock

    def victim(self, resident: Collection[str]) -> str:
        """See :class:`EvictionPolicy`."""
        return min(resident, key=lambda expert: (self._count.get(expert, 0.0), self._last.get(expert, 0)))


class Polar:
    """Removes the expert with the least demand, as learnt from the prompts' contexts in the manner of POLAR.

    On the fast time scale, every use is an example for a ridge regression of "is this expert needed" on the
    prompt's context. Older examples count less. On the slow one, every ``epoch`` uses, each expert's demand is
    forecast: the mean of ``theta_t . z`` over the epoch's contexts. Experts without a forecast rank below those with
    one, by how recently they were used.

    POLAR itself also routes: its bandit chooses the expert and counts the cost of loading it. Here the router alone
    chooses the expert, and the policy only manages the cache. Every request says for all experts whether they were
    needed, so LinUCB's confidence bounds are equally wide for all and are left out.

    Args:
        epoch: Number of uses between two forecasts.
        half_life: Number of uses after which an example counts half.

    Source: POLAR (Li and Li, 2026), which learns caching and routing at once; LinUCB (Li et al., 2010).
    """

    def __init__(self, epoch: int = 200, half_life: float = 2000.0) -> None:
        self._epoch, self._decay = epoch, 2 ** (-1 / half_life)
        self._gram: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._scale = 1.0  # the unit of all sums, so that discounting need not change them
        self._contexts: list[Tensor] = []
        self._forecast: dict[str, float] = {}
        self._recent = Lru()

    def used(self, expert: str, context: Context | None) -> None:
        """See :class:`EvictionPolicy`. Without contexts it learns how often each expert is needed."""
        z_D = torch.ones(1) if context is None else torch.cat([torch.ones(1), context.float().cpu()])
        z_D = z_D.double() / z_D.norm()
        if self._gram is None or len(self._gram) != len(z_D):
            self._gram, self._sums = torch.zeros(len(z_D), len(z_D), dtype=torch.float64), {}
        self._recent.used(expert, context)
        self._scale *= self._decay
        self._gram = self._gram * self._decay + torch.outer(z_D, z_D)
        self._sums[expert] = self._sums.get(expert, torch.zeros_like(z_D)) + z_D / self._scale
        self._contexts.append(z_D)
        if len(self._contexts) >= self._epoch:
            self._look_ahead()

    def victim(self, resident: Collection[str]) -> str:
        """See :class:`EvictionPolicy`."""
        known = [expert for expert in resident if expert in self._forecast]
        if len(known) < len(resident):
            return self._recent.victim([expert for expert in resident if expert not in self._forecast])
        return min(known, key=self._forecast.__getitem__)

    def _look_ahead(self) -> None:
        assert self._gram is not None
        inverse = torch.linalg.inv(self._gram + torch.eye(len(self._gram), dtype=torch.float64))
        z_ZD = torch.stack(self._contexts)
        names = list(self._sums)
        theta_ED = torch.stack([self._sums[name] for name in names]) * self._scale @ inverse
        demand_E = (theta_ED @ z_ZD.mean(0)).tolist()
        self._forecast = dict(zip(names, demand_E, strict=True))
        self._sums = {name: total * self._scale for name, total in self._sums.items()}
        self._scale = 1.0
        self._contexts = []


DEFAULT_POLICY = "lfu-aging"  # by benchmarks/paging.py: docs/appendix/scale.md has them

POLICIES: Registry[EvictionPolicy] = Registry(
    kind="policy",
    group="spectr.paging_policies",
    error=CompositionError,
    entries={
        "lru": "spectr.paging.policies:Lru",
        "lfu": "spectr.paging.policies:Lfu",
        "lfu-aging": entry("spectr.paging.policies:Lfu", half_life=2000.0),
        "polar": "spectr.paging.policies:Polar",
    },
)


def get_policy(name: str) -> EvictionPolicy:
    """Get a policy by name: lru, lfu, lfu-aging, polar, or one that a package added.

    Raises:
        CompositionError: The name is unknown.
    """
    return POLICIES.make(name)
