"""Simulated prompts for the cache of experts: the expert that each prompt needs, and its context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts that each need one of many experts; a few experts serve most prompts.

    Each expert belongs to a topic. A prompt's context is its topic's direction plus noise. Popularity follows Zipf's
    law, within a topic and among topics. Two random topics exchange their popularity every ``drift`` prompts.

    Attributes:
        experts: Number of experts.
        topics: Number of topics.
        exponent: Exponent of Zipf's law; 0 is uniform.
        drift: Prompts between two changes of popularity; ``None`` for a constant popularity.
        width: Size of a context.
        noise: Standard deviation of a context's entries; those of a topic's direction have standard deviation one.
        seed: Seed of all random numbers.
    """

    experts: int = 1000
    topics: int = 20
    exponent: float = 1.0
    drift: int | None = None
    width: int = 16
    noise: float = 0.5
    seed: int = 0

    def prompts(self, count: int) -> Iterator[tuple[str, Float[Tensor, " D"]]]:
        """Yield ``count`` prompts: the name of the expert that each needs, and its context."""
        chance = torch.Generator().manual_seed(self.seed)
        direction_ZD = torch.randn(self.topics, self.width, generator=chance)
        place = torch.randperm(self.topics, generator=chance)
        topic_E = torch.arange(self.experts) % self.topics
        rank_E = torch.arange(self.experts) // self.topics
        within_E = (1.0 + rank_E) ** -self.exponent
        batch = self.drift or count
        for begin in range(0, count, batch):
            if begin:
                pair = torch.randperm(self.topics, generator=chance)[:2]
                place[pair] = place[pair.flip(0)]
            weight_E = within_E * (1.0 + place[topic_E]) ** -self.exponent
            called = torch.multinomial(weight_E, min(batch, count - begin), replacement=True, generator=chance)
            noise = self.noise * torch.randn(len(called), self.width, generator=chance)
            for expert, context_D in zip(called.tolist(), direction_ZD[topic_E[called]] + noise, strict=True):
                yield f"{expert:05}", context_D
