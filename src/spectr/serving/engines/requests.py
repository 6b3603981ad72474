"""A request in the transformers engine, and the tokens that its client has read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from spectr.composition.request_batch import RequestDecision
from spectr.serving.engines.base import Step, Ticket


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
