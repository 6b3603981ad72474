"""Group values by key, or in order by number."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Values by key, both in the order of arrival."""
    found: dict[Key, list[Value]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def chunks(values: Sequence[Value], size: int) -> Iterator[Sequence[Value]]:
    """The values in their order, ``size`` at a time; the last may be fewer."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
