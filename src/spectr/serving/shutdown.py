"""Stop a server: running requests get time, new ones are refused, and each gets an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from spectr.serving.errors import RefusalError

FINAL_SECONDS = 2.0  # seconds for the last answers


class Shutdown:
    """Whether a server is stopping, and its running requests.

    Attributes:
        begun: New requests are refused.
        over: Running requests are cut off.
    """

    def __init__(self) -> None:
        self.begun = self.over = False
        self._under_way: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> int:
        """Requests without an answer yet."""
        return len(self._under_way)

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Inside the block, the current task is a running request; it is cancelled when the time is over."""
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        try:
            yield
        finally:
            self._under_way.discard(task)

    def check(self) -> None:
        """Raise :class:`RefusalError` for a request that arrives too late."""
        if self.begun:
            raise stopped("the server is stopping and takes no new requests")

    def begin(self) -> None:
        """Refuse new requests from now on."""
        self.begun = True

    async def end(self) -> None:
        """Cut off running requests; returns after they ended."""
        self.begin()
        self.over = True
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=FINAL_SECONDS)


def stopped(given: str = "the server stopped before this answer was complete") -> RefusalError:
    """The answer to a request that the stopping server does not complete."""
    return RefusalError(given, do="try again later", code="server_stopping", status=503)
