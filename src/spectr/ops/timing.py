"""Timing ways to compute the same in turn, and whether the machine had time for that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

_ROUNDS = 7  # at most
_HOPELESS = 2  # times the fastest first call; a slower way is no longer timed
_IDLE = 0.9  # the least share of time for which a thread has a core on an idle machine


class Clock(NamedTuple):
    """What time is measured by.

    Attributes:
        now: Seconds.
        used: Seconds for which this thread had a core.
    """

    now: Callable[[], float] = time.perf_counter
    used: Callable[[], float] = time.thread_time


REAL = Clock()


class LoadWatch:
    """Notes, while it is entered, whether this thread had to wait for others.

    Attributes:
        loaded: Whether it had.
    """

    def __init__(self, clock: Clock = REAL):
        self._clock, self.loaded = clock, False

    def __enter__(self) -> LoadWatch:
        self._began, self._used = self._clock.now(), self._clock.used()
        return self

    def __exit__(self, *_: object) -> None:
        wall, used = self._clock.now() - self._began, self._clock.used() - self._used
        self.loaded = used < _IDLE * wall


def time_in_turn(
    ways: Mapping[str, Callable[[], object]],
    seconds: float,
    clock: Clock = REAL,
) -> dict[str, float]:
    """The least seconds of each way, called in turn: what others take of the machine only adds to that.

    Args:
        ways: By name; a way whose call gives ``None`` does not work, and is left out.
        seconds: That all of this may take, roughly. Each is called twice at least.
        clock: To measure by.
    """

    def timed(run: Callable[[], object]) -> float:
        began = clock.now()
        run()
        return clock.now() - began

    began = clock.now()
    first = {name: timed(run) for name, run in ways.items() if run() is not None}
    hopeful = {name: [time] for name, time in first.items() if time <= _HOPELESS * min(first.values())}
    for _ in range(_ROUNDS - 1):
        if clock.now() - began > seconds or len(hopeful) < 2:
            break
        for name, times in hopeful.items():
            times.append(timed(ways[name]))
    return {**first, **{name: min(times) for name, times in hopeful.items()}}
