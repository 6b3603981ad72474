"""A cache of experts in memory, of a bounded size in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.paging.policies import Policy
from spectr.spectral import Share

Shares = Mapping[str, Share]  # one expert's share of each module's stack


@dataclass
class CacheStatistics:
    """What a cache has done.

    Attributes:
        hits: Experts called for that were there.
        misses: Experts that had to be loaded.
        evictions: Experts that had to go.
        seconds: Time spent loading.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of calls that found the expert there."""
        return self.hits / max(1, self.hits + self.misses)


class ExpertCache:
    """Experts in memory, loaded when called for; what a policy picks leaves when there is no room.

    Args:
        load: Reads an expert from disk.
        capacity: Bytes at most. All that one call names is loaded and returned, and stays as far as there is room.
        policy: Says who leaves.
    """

    def __init__(self, load: Callable[[str], Shares], capacity: int, policy: Policy):
        self._load, self.capacity, self._policy = load, capacity, policy
        self._there: dict[str, Shares] = {}
        self._bytes: dict[str, int] = {}
        self.figures = CacheStatistics()

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts that are there, in alphabetical order."""
        return tuple(sorted(self._there))

    @property
    def bytes(self) -> int:
        """What they take."""
        return sum(self._bytes.values())

    def fetch(self, names: Sequence[str], context: Float[Tensor, " D"] | None = None) -> dict[str, Shares]:
        """These experts, from memory or from disk.

        Args:
            names: Experts.
            context: What is known of the prompt that calls for them, for the policy.

        Raises:
            SpectrError: An expert's files are damaged. What was there stays.
        """
        found: dict[str, Shares] = {}
        for name in names:
            if name in self._there:
                found[name] = self._there[name]
                self.figures.hits += 1
            else:
                begin = time.perf_counter()
                found[name] = self._load(name)
                self.figures.seconds += time.perf_counter() - begin
                self.figures.misses += 1
            self._policy.used(name, context)
        for name, shares in found.items():
            if name not in self._there:
                self._there[name], self._bytes[name] = shares, _bytes(shares)
        while self.bytes > self.capacity:
            self._evict(found)
        return found

    def _evict(self, wanted: Mapping[str, Shares]) -> None:
        idle = [name for name in self._there if name not in wanted]
        victim = self._policy.victim(idle or list(self._there))
        del self._there[victim], self._bytes[victim]
        self.figures.evictions += 1


def _bytes(shares: Shares) -> int:
    tensors = (tensor for share in shares.values() for tensor in share if isinstance(tensor, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
