"""Errors that state what was given, what was expected and what to do.

A user's mistake raises :class:`SpectrError` or a subclass before anything changes. A broken invariant of our own is an
``assert``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
DOCUMENTATION = "https://spectr-lora.github.io/spectr/"
_SHOWN = 40  # names that a message lists at most


class SpectrError(ValueError):
    """A mistake that the user can correct.

    Args:
        given: What is wrong, with its path or name.
        expected: What would be right.
        do: The next step, preferably a command.
    """

    def __init__(self, given: str, *, expected: str | None = None, do: str | None = None):
        self.given, self.expected, self.do = given, expected, do
        lines = [given]
        lines += [f"  expected: {expected}"] if expected else []
        lines += [f"  to do: {do}"] if do else []
        super().__init__("\n".join(lines))


class SpectrWarning(FutureWarning):
    """Something that has no effect, or will stop working. The command line prints each text once."""


class AdapterError(SpectrError):
    """An adapter cannot be read, or cannot be routed exactly."""


class LibraryError(SpectrError):
    """An expert library is missing or damaged, or does not allow an operation."""


class CompositionError(SpectrError):
    """A model, a library and a router do not fit together."""


class MergeError(SpectrError):
    """Experts cannot be merged as requested."""


class DataError(SpectrError):
    """A task, template or data file cannot be used."""


class ModelError(SpectrError):
    """A base model cannot be found or loaded."""


class ExtractionError(SpectrError):
    """No expert can be extracted from these checkpoints, or reranked."""


class MissingExtraError(SpectrError, ImportError):
    """An optional dependency is missing.

    Args:
        feature: What needs the dependency.
        extra: The extra of ``spectr-lora`` that installs it.
        instead: An alternative for the user.
    """

    def __init__(self, feature: str, extra: str, *, instead: str | None = None):
        super().__init__(
            f"{feature} needs the extra '{extra}', which is not installed",
            do=f'pip install "spectr-lora[{extra}]"' + (f", or {instead}" if instead else ""),
        )


def raise_together(
    title: str, problems: Iterable[SpectrError], kind: type[SpectrError] = SpectrError, *, most: int | None = None
) -> None:
    """Raise one error with all problems. With one problem, raise it unchanged; with none, do nothing.

    Args:
        title: What the problems are about.
        problems: The problems.
        kind: Type of the error with several problems.
        most: Number of problems to print in full; the others are counted. By default all are printed.
    """
    found = list(problems)
    if len(found) == 1:
        raise found[0]
    if found:
        lines = [str(problem) for problem in found[:most]]
        lines += [f"and {len(found) - len(lines)} more"] if len(found) > len(lines) else []
        raise kind(f"{title}: {len(found)} problems\n" + "\n".join(f"- {line}" for line in lines))


def map_together(title: str, make: Callable[[T], R], items: Iterable[T], kind: type[SpectrError]) -> list[R]:
    """Apply a function to each item; the problems of all items are raised by :func:`raise_together`.

    Args:
        title: What the problems are about.
        make: The function.
        items: Its arguments.
        kind: Type of the error with several problems.
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
    """Append a :class:`SpectrError` of the block to ``problems``, for :func:`raise_together`.

    Args:
        problems: The list.
        place: Prefix of the error's text, such as a row of a file.
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
    """Yield an error for each value that is not ``right``; ``None`` is always right."""
    for name, value in values.items():
        if value is not None and not right(value):
            yield error(f"{name}={value!r}", expected=expected)


def first_line(error: Exception) -> str:
    """The first line with a word of another library's error; its type if there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def some_of(names: Sequence[str], shown: int, what: str = "") -> str:
    """The first few names, and the number of the others."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more{what}" if len(names) > shown else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the most similar known name, then the known names.

    Example:
        >>> did_you_mean("arow", ["arrow", "lag"])
        "did you mean 'arrow'? known: arrow, lag"
    """
    options = sorted(known, key=lambda text: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", text)])
    near = nearest(name, options, likeness=0.5)
    hint = f"did you mean '{near}'? " if near else ""
    more = f" and {len(options) - _SHOWN} more" if len(options) > _SHOWN else ""
    return f"{hint}known: {', '.join(options[:_SHOWN]) if options else 'none'}{more}"


def nearest(name: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """The most similar known name; ``None`` if none reaches this similarity, from 0 to 1."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return near[0] if near else None


def page(name: str) -> str:
    """The address of a page of the documentation, such as ``"howto/serving"``."""
    return f"{DOCUMENTATION}{name}.html"
