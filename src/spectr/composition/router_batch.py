"""Requests of several routers in one batch: each token goes to its own request's router, among its request's set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate

import torch
from torch import Tensor

from spectr.composition.multi_router import MultiRouter
from spectr.composition.request_batch import RequestBatch, RequestDecision, TokenRouting
from spectr.grouping import grouped
from spectr.layers.batch_routing import BASE, Span, routed_by
from spectr.layers.linear_layers import input_device
from spectr.lazy import lazy


class RouterBatch:
    """Gives every token of a batch the router and the set of its request.

    Outputs are those of a model that this router alone has composed with that set, up to rounding. Each router has a
    :class:`spectr.composition.request_batch.RequestBatch`, which describes how to call the model.

    Args:
        multi_router: The composed model. All calls are made by the thread that runs it, or while it does not run.

    Raises:
        CompositionError: A router cannot serve requests with sets of their own.
    """

    def __init__(self, multi_router: MultiRouter):
        self.multi_router = multi_router
        self._batches = {name: RequestBatch(routed, name) for name, routed in multi_router.compositions.items()}
        self._branches = {name: place for place, name in enumerate(multi_router.compositions)}
        self._device = input_device(multi_router.model)
        self._counts: list[int] = []
        self._own: dict[str, list[int]] = {}
        self._watched: list[int] = []

    def decide(self, router: str, experts: Sequence[str], input_ids: Tensor | None) -> RequestDecision:
        """What is to hold for a request with this router and set; see :meth:`RequestBatch.decide`."""
        return self._batches[router].decide(experts, input_ids)

    def set_tokens(self, spans: Sequence[tuple[RequestDecision, int]]) -> None:
        """Set what the next calls' tokens are: a number for each request in turn; one span serves any length."""
        self._counts = [count for _, count in spans]
        self._own = grouped((decision.router, number) for number, (decision, _) in enumerate(spans))
        for router, numbers in self._own.items():
            self._batches[router].set_tokens([spans[number] for number in numbers])

    def in_force(self) -> AbstractContextManager[None]:
        """Calls of this thread inside the block are routed so."""
        spans = [
            Span(self._branches[router], self._places(numbers), self._batches[router].routing())
            for router, numbers in self._own.items()
        ]
        return routed_by(spans[0].routing if len(spans) == 1 else BASE, spans=spans)

    def watch(self, spans: Iterable[int], layers: bool) -> None:
        """Have the next call record what is decided for the last token of these spans.

        Args:
            spans: Their numbers.
            layers: Whether each layer's decision is wanted, or shares alone.
        """
        wanted, self._watched = set(spans), []
        for router, request_batch in self._batches.items():
            numbers = self._own.get(router, [])
            ends = [end - 1 for end in accumulate(self._counts[number] for number in numbers)]
            rows = dict(zip(numbers, ends if len(numbers) > 1 else [-1], strict=False))
            self._watched += [number for number in rows if number in wanted]
            request_batch.watch([row for number, row in rows.items() if number in wanted], layers)

    def seen(self) -> dict[int, TokenRouting]:
        """What the last call decided, by the number of each watched span."""
        routings = [routing for request_batch in self._batches.values() for routing in request_batch.seen()]
        return dict(zip(self._watched, routings, strict=True))

    def share(self, decision: RequestDecision) -> TokenRouting | None:
        """See :meth:`RequestBatch.share`."""
        return self._batches[decision.router].share(decision)

    def discard(self, name: str) -> None:
        """Forget an expert, with all routers; see :meth:`RequestBatch.discard`."""
        for request_batch in self._batches.values():
            request_batch.discard(name)
        self.multi_router.refresh()

    def close(self) -> None:
        """Leave the compositions as they were made; the model's tokens are all the default router's."""
        for request_batch in self._batches.values():
            request_batch.close()
        self.multi_router.refresh()

    def _places(self, numbers: list[int]) -> slice | Tensor:
        """Where these spans' tokens are."""
        starts = [0, *accumulate(self._counts)]
        if numbers == list(range(numbers[0], numbers[-1] + 1)):
            return slice(starts[numbers[0]], starts[numbers[-1] + 1])
        rows = [torch.arange(starts[number], starts[number + 1]) for number in numbers]
        return torch.cat(rows).to(self._device)


__getattr__ = lazy(__name__, {}, renamed={"Junction": "RouterBatch"})
