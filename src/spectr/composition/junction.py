"""Requests of several routers in one batch: each token goes to its own request's router, among its request's set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate

import torch
from torch import Tensor

from spectr.composition.several import Several
from spectr.composition.steering import Rule, Steering, TokenRouting
from spectr.layers.batch_routing import BASE, Span, routed_by


class Junction:
    """Gives every token of a batch the router and the set of its request.

    Outputs are those of a model that this router alone has composed with that set, up to rounding. See
    :class:`spectr.composition.steering.Steering`, of which each router has one, for how the model is to be called.

    Args:
        several: The composed model. All calls are made by the thread that runs it, or while it does not run.

    Raises:
        CompositionError: A router cannot be steered.
    """

    def __init__(self, several: Several):
        self.several = several
        self._steerings = {name: Steering(routed, name) for name, routed in several.compositions.items()}
        self._branches = {name: place for place, name in enumerate(several.compositions)}
        self._device = next(several.model.parameters()).device
        self._counts: list[int] = []
        self._own: dict[str, list[int]] = {}
        self._watched: list[int] = []

    def rule(self, router: str, experts: Sequence[str], input_ids: Tensor | None) -> Rule:
        """What is to hold for a request with this router and set; see :meth:`Steering.rule`."""
        return self._steerings[router].rule(experts, input_ids)

    def steer(self, spans: Sequence[tuple[Rule, int]]) -> None:
        """Say what the next calls' tokens are: a number of each rule in turn; one span serves any length."""
        self._counts, self._own = [count for _, count in spans], {}
        for number, (rule, _) in enumerate(spans):
            self._own.setdefault(rule.router, []).append(number)
        for router, numbers in self._own.items():
            self._steerings[router].steer([spans[number] for number in numbers])

    def in_force(self) -> AbstractContextManager[None]:
        """Calls of this thread inside the block are routed so."""
        spans = [
            Span(self._branches[router], self._places(numbers), self._steerings[router].routing())
            for router, numbers in self._own.items()
        ]
        return routed_by(spans[0].routing if len(spans) == 1 else BASE, spans=spans)

    def watch(self, spans: Iterable[int], layers: bool) -> None:
        """Have the next call remember what is decided for the last token of these spans.

        Args:
            spans: Their numbers.
            layers: Whether each layer's decision is wanted, or shares alone.
        """
        wanted, self._watched = set(spans), []
        for router, steering in self._steerings.items():
            numbers = self._own.get(router, [])
            ends = [end - 1 for end in accumulate(self._counts[number] for number in numbers)]
            rows = dict(zip(numbers, ends if len(numbers) > 1 else [-1], strict=False))
            self._watched += [number for number in rows if number in wanted]
            steering.watch([row for number, row in rows.items() if number in wanted], layers)

    def seen(self) -> dict[int, TokenRouting]:
        """What the last call decided, by the number of each watched span."""
        routings = [routing for steering in self._steerings.values() for routing in steering.seen()]
        return dict(zip(self._watched, routings, strict=True))

    def share(self, rule: Rule) -> TokenRouting | None:
        """See :meth:`Steering.share`."""
        return self._steerings[rule.router].share(rule)

    def discard(self, name: str) -> None:
        """Forget an expert, with all routers; see :meth:`Steering.discard`."""
        for steering in self._steerings.values():
            steering.discard(name)
        self.several.refork()

    def close(self) -> None:
        """Leave the compositions as they were made; the model's tokens are all the default router's."""
        for steering in self._steerings.values():
            steering.close()
        self.several.refork()

    def _places(self, numbers: list[int]) -> slice | Tensor:
        """Where these spans' tokens are."""
        starts = [0, *accumulate(self._counts)]
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return slice(starts[numbers[0]], starts[numbers[-1] + 1])
        rows = [torch.arange(starts[number], starts[number + 1]) for number in numbers]
        return torch.cat(rows).to(self._device)
