"""Where output goes: results to standard output, everything else to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_WIDE = 200  # columns of a table in a file, so that no cell is cut


out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else _WIDE)
errors = Console(stderr=True)

Advance = Callable[[str, int, int, str], None]
_QUIET_SECONDS = 15.0  # between two progress lines of a phase, outside a terminal


def say(message: str) -> None:
    """Print one line about the current step to standard error."""
    errors.print(f"\u00b7 {message}", style="dim", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def interruptible(remark: Callable[[], str]) -> Iterator[None]:
    """At Ctrl-C, print what happens to the finished work."""
    try:
        yield
    except KeyboardInterrupt:
        say(remark())
        raise


@contextmanager
def bar() -> Iterator[Advance]:
    """Progress on standard error; yields ``advance(phase, done, total, remark)``.

    In a terminal: bars. Elsewhere (a log file, CI): a line at the end of each phase, and every 15 seconds.
    """
    if not errors.is_terminal:
        yield _lines()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[remark]}"), console=errors) as progress:
        tasks = {}

        def advance(phase: str, done: int, total: int, remark: str = "") -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total, remark="")
            progress.update(tasks[phase], completed=done, total=total, remark=remark)

        yield advance


def _lines() -> Advance:
    shown: dict[str, float] = {}

    def advance(phase: str, done: int, total: int, remark: str = "") -> None:
        now = time.monotonic()
        began = shown.setdefault(phase, now)
        if done == total or now - began >= _QUIET_SECONDS:
            say(f"{phase}: {done} of {total}{f' ({remark})' if remark else ''}")
            shown[phase] = now

    return advance
