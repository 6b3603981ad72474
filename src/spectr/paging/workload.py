"""Streams of prompts for a cache to serve: which expert each calls for, and what is known of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts that call for one of many experts, few of them for most.

    Experts belong to topics; a prompt's context is its topic's direction with noise. Within a topic and among topics
    popularity follows Zipf's law. Where it drifts, the topics' popularity is dealt anew, one pair of topics changing
    places after every ``drift`` prompts.

    Attributes:
        experts: How many there are.
        topics: Of how many topics.
        exponent: Of Zipf's law; 0 is uniform.
        drift: Prompts between two changes; ``None`` for none.
        width: Numbers in a context.
        noise: Standard deviation of a context's entries around its topic's, which are of size one.
        seed: Of everything random.
    """

    experts: int = 1000
    topics: int = 20
    exponent: float = 1.0
    drift: int | None = None
    width: int = 16
    noise: float = 0.5
    seed: int = 0

    def prompts(self, count: int) -> Iterator[tuple[str, Float[Tensor, " D"]]]:
        """That many prompts: the expert that each calls for, and its context."""
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
