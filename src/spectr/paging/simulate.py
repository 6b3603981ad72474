"""What a policy would do on a workload, without any expert being read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spectr.paging.policies import Policy
from spectr.paging.shelf import Shares, Shelf
from spectr.paging.workload import Workload
from spectr.spectral import Prepared

_ONE: Shares = {"": Prepared(torch.zeros(1, 1), torch.zeros(0, 1))}  # an expert of four bytes
_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Of the second half of a workload, when the cache is warm.

    Attributes:
        hit_rate: Share of prompts whose expert was in memory.
        added: Milliseconds that a prompt waits for its expert, on average.
    """

    hit_rate: float
    added: float


def simulate(workload: Workload, policy: Policy, *, room: int, prompts: int, load_ms: float) -> Simulated:
    """Serve a workload with the real cache and the real policy; only the experts are not read.

    Args:
        workload: Which experts are called for.
        policy: A fresh one.
        room: Experts that fit.
        prompts: How many; the first half warms up.
        load_ms: What reading one expert takes.
    """
    shelf = Shelf(lambda _: _ONE, room * _SIZE, policy)
    warm_hits = warm_misses = 0
    for number, (expert, context_D) in enumerate(workload.prompts(prompts)):
        if number == prompts // 2:
            warm_hits, warm_misses = shelf.figures.hits, shelf.figures.misses
        shelf.fetch([expert], context_D)
    hits, misses = shelf.figures.hits - warm_hits, shelf.figures.misses - warm_misses
    return Simulated(hit_rate=hits / (hits + misses), added=load_ms * misses / (hits + misses))
