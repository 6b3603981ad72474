"""Errors that say what was given, what was expected and what to do.

Everything a user can get wrong raises :class:`SpectrError` or a subclass before anything is changed. A broken invariant
of ours is an ``assert``, never one of these.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
_SHOWN = 40  # known names that a message lists


class SpectrError(ValueError):
    """A mistake that the user can correct.

    Args:
        given: What was found, with the path or name it was found under.
        expected: What would have been right.
        do: The next step, best as a command.
    """

    def __init__(self, given: str, *, expected: str | None = None, do: str | None = None):
        self.given, self.expected, self.do = given, expected, do
        lines = [given]
        lines += [f"  expected: {expected}"] if expected else []
        lines += [f"  to do: {do}"] if do else []
        super().__init__("\n".join(lines))


class SpectrWarning(FutureWarning):
    """What still works but will not for long, or has no effect; the command line shows each text once."""


class AdapterError(SpectrError):
    """An adapter that cannot be read, or cannot be routed exactly."""


class LibraryError(SpectrError):
    """An expert library that is missing, damaged, or does not allow that."""


class CompositionError(SpectrError):
    """A model, library and router that do not go together."""


class MergeError(SpectrError):
    """Experts that cannot be merged like that."""


class DataError(SpectrError):
    """A task, template or data file that cannot be used."""


class ModelError(SpectrError):
    """A base model that cannot be found or loaded."""


class ExtractionError(SpectrError):
    """Two checkpoints, or an expert, that no such expert can be taken from."""


class MissingExtraError(SpectrError, ImportError):
    """An optional dependency that the called feature needs.

    Args:
        feature: What needs it.
        extra: Its name among those of ``spectr-lora``.
        instead: What else the user can do.
    """

    def __init__(self, feature: str, extra: str, *, instead: str | None = None):
        super().__init__(
            f"{feature} needs the extra '{extra}', which is not installed",
            do=f'pip install "spectr-lora[{extra}]"' + (f", or {instead}" if instead else ""),
        )


def raise_together(
    title: str, problems: Iterable[SpectrError], kind: type[SpectrError] = SpectrError, *, most: int | None = None
) -> None:
    """Raise one error that carries every problem, the problem itself when there is one, nothing when there is none.

    Args:
        title: What they are problems of.
        problems: What is wrong.
        kind: Of the error that carries several.
        most: Problems that are written in full; of the others only the number. By default all are.
    """
    found = list(problems)
    if len(found) == 1:
        raise found[0]
    if found:
        lines = [str(problem) for problem in found[:most]]
        lines += [f"and {len(found) - len(lines)} more"] if len(found) > len(lines) else []
        raise kind(f"{title}: {len(found)} problems\n" + "\n".join(f"- {line}" for line in lines))


def map_together(title: str, make: Callable[[T], R], items: Iterable[T], kind: type[SpectrError]) -> list[R]:
    """What a function makes of each item; the problems of all items are raised by :func:`raise_together`.

    Args:
        title: What they are problems of.
        make: The function.
        items: What it is given, one after the other.
        kind: Of the error that carries several.
    """
    made: list[R] = []
    problems: list[SpectrError] = []
    for item in items:
        with collecting(problems):
            made.append(make(item))
    raise_together(title, problems, kind)
    return made


@contextmanager
def collecting(problems: list[SpectrError], place: str = "") -> Iterator[None]:
    """Append a :class:`SpectrError` of the block to a list, for :func:`raise_together`.

    Args:
        problems: The list.
        place: Comes first in the error's text, such as a row of a file.
    """
    try:
        yield
    except SpectrError as problem:
        if place:
            problem = type(problem)(f"{place}: {problem.given}", expected=problem.expected, do=problem.do)
        problems.append(problem)


def range_faults(
    error: type[SpectrError], expected: str, right: Callable[[Any], bool], **values: Any
) -> Iterator[SpectrError]:
    """An error for each value that is not ``right``; ``None`` always is."""
    for name, value in values.items():
        if value is not None and not right(value):
            yield error(f"{name}={value!r}", expected=expected)


def some_of(names: Sequence[str], shown: int, what: str = "") -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more{what}" if len(names) > shown else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A closing phrase for an unknown name: the nearest known one, and then all of them, or the first of very many."""
    options = sorted(known, key=lambda text: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", text)])
    near = nearest(name, options, likeness=0.5)
    hint = f"did you mean '{near}'? " if near else ""
    more = f" and {len(options) - _SHOWN} more" if len(options) > _SHOWN else ""
    return f"{hint}known: {', '.join(options[:_SHOWN]) if options else 'none'}{more}"


def nearest(name: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """The known name that is most similar to this one; ``None`` where none is as alike, of 1."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return near[0] if near else None
