"""A cache policy on a simulated workload: hit rate and added time. No expert is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spectr.paging.expert_cache import ExpertCache, Shares
from spectr.paging.policies import EvictionPolicy
from spectr.spectral import Share
from workload import Workload

_ONE: Shares = {"": Share(torch.zeros(1, 1), torch.zeros(0, 1))}  # an expert of four bytes
_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Results for the second half of a workload, when the cache is warm.

    Attributes:
        hit_rate: Fraction of prompts whose expert was in memory.
        added: Mean time in milliseconds that a prompt waits for its expert.
    """

    hit_rate: float
    added: float


def simulate(workload: Workload, policy: EvictionPolicy, *, room: int, prompts: int, load_ms: float) -> Simulated:
    """Serve a workload with the real cache and the real policy; only the reading of experts is left out.

    Args:
        workload: Gives the prompts and their experts.
        policy: A fresh policy, without history.
        room: Number of experts that fit into the cache.
        prompts: Number of prompts; the first half warms the cache.
        load_ms: Time in milliseconds to read one expert.
    """
    cache = ExpertCache(lambda _: _ONE, room * _SIZE, policy)
    warm_hits = warm_misses = 0
    for number, (expert, context_D) in enumerate(workload.prompts(prompts)):
        if number == prompts // 2:
            warm_hits, warm_misses = cache.figures.hits, cache.figures.misses
        cache.fetch([expert], context_D)
    hits, misses = cache.figures.hits - warm_hits, cache.figures.misses - warm_misses
    return Simulated(hit_rate=hits / (hits + misses), added=load_ms * misses / (hits + misses))
