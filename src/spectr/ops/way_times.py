"""How long each way of computing takes for each shape of a layer: timed on first use, and kept in the cache folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spectr.atomic_write import replacing
from spectr.ops.timing import REAL, Clock, LoadWatch
from spectr.ops.ways import TOKENS, Shape

_EACH = 0.3  # seconds for timing a shape, roughly
_SECONDS = 1.2  # seconds for which one process times layers; later shapes use the most similar one's times


class WayTimes(NamedTuple):
    """The timings of one shape.

    Attributes:
        seconds: For each of :data:`spectr.ops.ways.TOKENS`, the seconds of each way by name.
        origin: How they were obtained, for reports.
    """

    seconds: list[Mapping[str, float]]
    origin: str


class TimedShapes:
    """The shapes that this process timed, and those in a file that processes share.

    Args:
        file: JSON, valid for one machine, version and number of threads.
        measure: Times all ways for a shape, given a budget in seconds. The last argument says whether to time one
            thread by its processor time; otherwise all threads are timed together.
        clock: Measures time.
    """

    def __init__(
        self,
        file: Path,
        measure: Callable[[Shape, float, bool], list[dict[str, float]]],
        clock: Clock = REAL,
    ):
        self._file, self._measure, self._clock = file, measure, clock
        self._shapes: dict[str, Shape] = {}
        self._known: dict[str, WayTimes] = {}
        self._spent = 0.0

    def of(self, shape: Shape) -> WayTimes:
        """The times of a shape, measured if there is time for that."""
        if shape.key not in self._known:
            kept = self._read().get(shape.key)
            self._known[shape.key] = self._new(shape) if kept is None else WayTimes(kept, "timed before")
            self._shapes[shape.key] = shape
        return self._known[shape.key]

    def nearest(self, shape: Shape) -> WayTimes | None:
        """The times of the most similar shape of those that this process knows; nothing is measured."""
        if shape.key in self._known:
            return self._known[shape.key]
        alike = [key for key, known in self._shapes.items() if (known.dtype, not known.k) == (shape.dtype, not shape.k)]
        if not alike:
            return None
        best = min(alike, key=lambda key: _distance(self._shapes[key], shape))
        return self._known[best]._replace(origin=f"as for {self._shapes[best].key}")

    def _new(self, shape: Shape) -> WayTimes:
        left = _SECONDS - self._spent
        near = self.nearest(shape) if left <= 0 else None
        if near is not None:
            return near
        with LoadWatch(self._clock) as watch:
            began = self._clock.used()
            seconds = self._measure(shape, _EACH, False)
        if watch.loaded:  # waiting threads measure the other processes, too
            seconds = self._measure(shape, 2 * _EACH, True)
        else:
            self._keep(shape.key, seconds)
        self._spent += self._clock.used() - began
        return WayTimes(list(seconds), "by one thread, while other work ran, not kept" if watch.loaded else "timed now")

    def _read(self) -> dict[str, list[Mapping[str, float]]]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and all(map(_is_whole, found.values())) else {}

    def _keep(self, key: str, seconds: list[dict[str, float]]) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._file) as scratch:
                scratch.write_text(json.dumps({**self._read(), key: seconds}, indent=1), encoding="utf-8")
        except OSError:
            return  # timed again by the next process


def _is_whole(times: Any) -> bool:
    """Whether this is what :meth:`TimedShapes.of` keeps."""
    return isinstance(times, list) and len(times) == len(TOKENS) and all(isinstance(one, dict) for one in times)


def _distance(one: Shape, other: Shape) -> float:
    sizes = zip(one[1:], other[1:], strict=True)
    return sum(abs((a + 1).bit_length() - (b + 1).bit_length()) for a, b in sizes)
