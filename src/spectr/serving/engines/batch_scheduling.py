"""Requests in the transformers engine: which one each token of a model's call belongs to, and its decision."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectr.composition.multi_router import MultiRouter
from spectr.composition.request_batch import RequestDecision
from spectr.composition.router_batch import RouterBatch
from spectr.layers.linear_layers import input_device
from spectr.serving.engines.engine import Step, Ticket


@dataclass(eq=False)
class Running:
    """One request, from admission to its end.

    Attributes:
        ticket: Its ticket.
        body: The body for the application.
        decision: The decision for its tokens, after its prompt was read.
        always: The routing of each of its tokens, if known in advance.
        steps: The routing of every generated token.
        marks: For each piece of text that was queued for the client, the number of tokens so far.
        reported: Number of tokens whose routing the client has.
        over: Set when no client waits for it.
        stop: Stops generation that is still running for it.
    """

    ticket: Ticket
    body: dict[str, Any]
    decision: RequestDecision | None = None
    always: Step | None = None
    steps: list[Step] = field(default_factory=list)
    marks: deque[int] = field(default_factory=deque)
    reported: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    stop: Callable[[], None] = lambda: None

    def take(self, answer: dict[str, Any]) -> dict[int, Sequence[Step]]:
        """The routing for a complete answer or for a chunk."""
        choice = (answer.get("choices") or [{}])[0]
        if choice.get("finish_reason"):
            return {0: self._upto(len(self.steps))}
        if _has_text(choice) and self.marks:
            return {0: self._upto(self.marks.popleft())}
        return {0: ()}

    def _upto(self, count: int) -> Sequence[Step]:
        fresh = self.steps[self.reported : count]
        self.reported += len(fresh)
        return fresh


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return "text" in choice
    return any(delta.get(key) is not None for key in ("content", "reasoning_content", "tool_calls"))


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
        self._device = input_device(model)
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
