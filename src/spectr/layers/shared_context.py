"""A context that threads share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class SharedContext:
    """Holds a context of the whole process while any thread is inside: the first enters it, the last leaves it.

    Contexts that each thread enters itself would end in the wrong order, and restore what another thread had set.

    Args:
        make: Makes the context.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]):
        self._make, self._lock, self._inside = make, threading.Lock(), 0
        self._context: AbstractContextManager[Any] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A block of one thread."""
        with self._lock:
            if self._context is None:
                context = self._make()
                context.__enter__()
                self._context = context
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    context, self._context = self._context, None
                    context.__exit__(None, None, None)
