"""Where text goes: results to standard output, everything else to standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

out = Console(soft_wrap=True)
errors = Console(stderr=True)


def say(message: str) -> None:
    """One line about what happens now, on standard error."""
    errors.print(f"[dim]\u00b7 {message}[/]", highlight=False)


@contextmanager
def bar() -> Iterator[Callable[[str, int, int, str], None]]:
    """A progress bar on standard error; yields ``advance(phase, done, total, remark)``."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[remark]}"), console=errors) as progress:
        tasks = {}

        def advance(phase: str, done: int, total: int, remark: str = "") -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total, remark="")
            progress.update(tasks[phase], completed=done, total=total, remark=remark)

        yield advance
