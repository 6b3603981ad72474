"""Keeps changes of a composed model's experts and its running calls apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spectr.errors import CompositionError


class Exclusion:
    """Any number of calls run at once; a change waits until none of another thread runs, and then runs alone.

    Attributes:
        lock: Guards what calls share.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._state = threading.Condition()
        self._running: dict[int, int] = {}
        self._changer: int | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """A call."""
        me = threading.get_ident()
        with self._state:
            while me not in self._running and self._changer not in (None, me):
                self._state.wait()
            self._running[me] = self._running.get(me, 0) + 1
        try:
            yield
        finally:
            with self._state:
                self._running[me] -= 1
                if not self._running[me]:
                    del self._running[me]
                    self._state.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """A change.

        Raises:
            CompositionError: A call of this thread runs.
        """
        me = threading.get_ident()
        with self._state:
            if me in self._running:
                raise CompositionError(
                    "the experts cannot be changed from inside a call of the model",
                    do="change them when it has returned",
                )
            while self._running or self._changer not in (None, me):
                self._state.wait()
            before, self._changer = self._changer, me
        try:
            yield
        finally:
            with self._state:
                self._changer = before
                self._state.notify_all()

    def __getstate__(self) -> dict[str, Any]:
        """Locks are not copied."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
