"""Which request each token of a model's call belongs to, and the decision for that request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectr.composition.multi_router import MultiRouter
from spectr.composition.request_batch import RequestDecision
from spectr.composition.router_batch import RouterBatch
from spectr.serving.engines.base import Step
from spectr.serving.engines.requests import Running

log = logging.getLogger("spectr.serving")


class Part(NamedTuple):
    """Tokens of one call that belong to one request.

    Attributes:
        running: The request; ``None`` if unknown, so that no expert is used.
        tokens: Number of tokens.
        generates: Whether the last of them generates a token of the answer.
        prompt: The prompt to decide on, if the decision is not made yet.
        fail: Ends the request with an error.
    """

    running: Running | None
    tokens: int
    generates: bool
    prompt: list[int] | None = None
    fail: Callable[[Exception], None] = lambda _: None


class BatchScheduler:
    """Gives each token of a composed model's calls its request's router and experts, and records the
    decisions.

    It hooks the model's calls; ``parts`` lists the tokens of a call.

    Args:
        multi_router: The composed model.
    """

    def __init__(self, multi_router: MultiRouter):
        self.router_batch = RouterBatch(multi_router)
        self.parts: Callable[[], list[Part]] = list
        self._nobody = self.router_batch.decide(next(iter(multi_router.compositions)), (), None)
        self._deciding = False
        self._generating: dict[int, Running] = {}
        self._call = ExitStack()
        model = multi_router.model
        self._device = next(model.parameters()).device
        self._hooks = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def decide(self, running: Running, prompt: Tensor) -> None:
        """Read a request's prompt if its router needs that. The model must not run meanwhile."""
        self._deciding = True
        try:
            running.decision = self.router_batch.decide(running.ticket.router, running.ticket.experts, prompt)
        finally:
            self._deciding = False
        share, p = self.router_batch.share(running.decision), running.decision.p
        running.always = None if share is None or running.ticket.record == "layers" else Step(share.shares, p=p)

    @contextmanager
    def only(self, running: Running, prompt: Tensor) -> Iterator[None]:
        """Inside the block, all calls belong to this request."""
        self.decide(running, prompt)
        self.parts = lambda: [Part(running, 1, True)]
        try:
            yield
        finally:
            self.parts = list

    def close(self) -> None:
        """Restore the model as it was composed."""
        for hook in self._hooks:
            hook.remove()
        self.router_batch.close()

    def _before(self, *_: Any) -> None:
        if self._deciding:  # a guide is letting the base model write
            return
        parts = self.parts() or [Part(None, 1, False)]
        self.router_batch.set_tokens([(self._decision(part), part.tokens) for part in parts])
        self._generating = {
            number: part.running
            for number, part in enumerate(parts)
            if part.running is not None and part.generates and part.running.ticket.record != "none"
        }
        recorded = {number: running for number, running in self._generating.items() if running.always is None}
        in_full = any(running.ticket.record == "layers" for running in recorded.values())
        self.router_batch.watch(recorded, in_full)
        self._call.enter_context(self.router_batch.in_force())

    def _decision(self, part: Part) -> RequestDecision:
        running = part.running
        if running is None:
            return self._nobody
        if running.decision is None:
            try:
                self.decide(running, torch.tensor(part.prompt, device=self._device))
            except Exception as error:  # affects this request only, not the others in the batch
                log.exception("deciding on a prompt failed")
                running.decision = self._nobody
                part.fail(error)
        assert running.decision is not None
        return running.decision

    def _after(self, _model: Any, _inputs: Any, output: Any) -> None:
        if self._deciding:
            return
        self._call.close()
        if output is None:  # the call failed
            return
        routings = self.router_batch.seen()
        for number, running in self._generating.items():
            step = running.always or Step(*routings[number], p=running.decision.p if running.decision else None)
            running.steps.append(step)
        self._generating = {}
