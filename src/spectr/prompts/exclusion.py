"""Keep changes of a composed model's experts and its running calls apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spectr.errors import CompositionError

_PATIENCE = 30.0  # seconds; a running call may itself wait for the new one, so neither may wait forever


class Exclusion:
    """Any number of calls run at once. A change waits until no other thread runs a call, and then runs alone.

    A new call lets waiting changes go first, for a limited time.

    Attributes:
        lock: Guards the data that calls share.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._state = threading.Condition()
        self._running: dict[int, int] = {}
        self._changer: int | None = None
        self._waiting = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A call."""
        me = threading.get_ident()
        with self._state:
            if me not in self._running and self._changer != me:
                self._state.wait_for(lambda: self._changer is None and not self._waiting, _PATIENCE)
                self._state.wait_for(lambda: self._changer is None)
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
        """A change of the experts.

        Raises:
            CompositionError: This thread is inside a call.
        """
        me = threading.get_ident()
        with self._state:
            if me in self._running:
                raise CompositionError(
                    "the experts cannot change during a call of the model",
                    do="change them after the call returns",
                )
            self._waiting += 1
            try:
                self._state.wait_for(lambda: not self._running and self._changer in (None, me))
            finally:  # also of a wait that Ctrl-C ends
                self._waiting -= 1
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
