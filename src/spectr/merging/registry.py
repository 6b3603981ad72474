"""Methods by name, the built-in ones and those that a package adds by an entry point of ``spectr.merging``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from spectr.errors import MergeError, did_you_mean
from spectr.merging.dare import Dare, DareTies
from spectr.merging.knots import Knots
from spectr.merging.linear import Average, GenKnowSub, Linear
from spectr.merging.method import Method
from spectr.merging.ties import Ties

ENTRY_POINTS = "spectr.merging"

_BUILT_IN: dict[str, Callable[..., Method]] = {
    kind.name: kind for kind in (Average, Linear, Ties, Dare, DareTies, Knots, GenKnowSub)
}


def method_names() -> tuple[str, ...]:
    """All names that :func:`get_method` knows, in alphabetical order."""
    return tuple(sorted({*_BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))}))


def get_method(name: str, **options: Any) -> Method:
    """A method by name.

    Args:
        name: One of :func:`method_names`.
        options: Its settings, as in ``density=0.3``.

    Raises:
        MergeError: The name or an option is unknown, or an option's value is out of range.
    """
    make: Any = _BUILT_IN.get(name)
    if make is None:
        point = next((p for p in entry_points(group=ENTRY_POINTS) if p.name == name), None)
        if point is None:
            raise MergeError(f"unknown method '{name}'", do=did_you_mean(name, method_names()))
        make = point.load()
    known = list(inspect.signature(make).parameters)
    strange = sorted(set(options) - set(known))
    if strange:
        raise MergeError(
            f"method '{name}' has no {' and no '.join(strange)}",
            expected=f"some of: {', '.join(known)}" if known else "no settings",
            do="leave it out, or choose another method",
        )
    return make(**options)
