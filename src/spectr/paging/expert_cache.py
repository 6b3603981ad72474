"""A cache of experts in memory, limited in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.paging.policies import EvictionPolicy
from spectr.spectral import Share

Shares = Mapping[str, Share]  # one expert's share of each module's stack


@dataclass
class CacheStatistics:
    """Statistics of a cache.

    Attributes:
        hits: Requested experts that were in memory.
        misses: Requested experts that had to be loaded.
        evictions: Experts that were removed to make room.
        seconds: Time spent on loading.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of requests that found the expert in memory."""
        return self.hits / max(1, self.hits + self.misses)


class ExpertCache:
    """Experts in memory, loaded on request. When the cache is full, a policy picks the experts to remove.

    Args:
        load: Reads an expert from disk.
        capacity: Limit in bytes. One call loads and returns all experts that it names; they stay as far as there is
            room.
        policy: Picks the expert to remove.
    """

    def __init__(self, load: Callable[[str], Shares], capacity: int, policy: EvictionPolicy):
        self._load, self.capacity, self._policy = load, capacity, policy
        self._there: dict[str, Shares] = {}
        self._bytes: dict[str, int] = {}
        self.figures = CacheStatistics()

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts in memory, in alphabetical order."""
        return tuple(sorted(self._there))

    @property
    def bytes(self) -> int:
        """The size of the experts in memory."""
        return sum(self._bytes.values())

    def fetch(self, names: Sequence[str], context: Float[Tensor, " D"] | None = None) -> dict[str, Shares]:
        """Get experts from memory or from disk.

        Args:
            names: The experts.
            context: What is known about the prompt that needs them, for the policy.

        Raises:
            SpectrError: An expert's files are damaged. The cache is unchanged.
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
