"""Routers by name: every combination that the papers use, and what third parties add by entry point.

A package adds a router with an entry point of the group ``spectr.routers`` whose object is called with options and
returns a router; the built-in ones go through the same table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from spectr.errors import CompositionError, did_you_mean
from spectr.routers.arrow import Arrow
from spectr.routers.base import Router
from spectr.routers.calibrated import Calibrated
from spectr.routers.glider import Glider
from spectr.routers.lag import Lag
from spectr.routers.oracle import Oracle
from spectr.routers.phatgoose import Phatgoose
from spectr.routers.seqr import Seqr
from spectr.routers.shortlist import Shortlist
from spectr.routers.spectr import Spectr
from spectr.routers.uniform import Uniform
from spectr.routers.version1 import adapted

ENTRY_POINTS = "spectr.routers"

_BUILT_IN: dict[str, Callable[..., Router]] = {
    "spectr": Spectr,
    "spectr-paper": partial(Spectr, combine="factors"),
    "spectr-softmax": partial(Spectr, weights="softmax"),
    "spectr-projection": partial(Spectr, score="projection"),
    "spectr-code": partial(Spectr, score="projection", combine="factors"),
    "calibrated": Calibrated,
    "calibrated-prior": partial(Calibrated, level="prior"),
    "calibrated-token": partial(Calibrated, level="token", top_k=4),
    "arrow": Arrow,
    "phatgoose": Phatgoose,
    "glider": Glider,
    "glider-global": partial(Glider, local=None),
    "glider-spectr": partial(Glider, local=Spectr(top_k=1)),
    "lag": Lag,
    "seqr": Seqr,
    "shortlist": Shortlist,
    "mu": Uniform,
    "uniform": Uniform,
    "oracle": Oracle,
}


def router_names() -> tuple[str, ...]:
    """All names that :func:`get_router` knows, in alphabetical order."""
    return tuple(sorted({*_BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))}))


def get_router(name: str, **options: Any) -> Router:
    """A router by name.

    Args:
        name: One of :func:`router_names`.
        options: Its settings, as in ``top_k=2``.

    Raises:
        CompositionError: The name or an option is unknown, or an option's value is out of range.
    """
    make: Any = _BUILT_IN.get(name)
    if make is None:
        point = next((p for p in entry_points(group=ENTRY_POINTS) if p.name == name), None)
        if point is None:
            raise CompositionError(f"unknown router '{name}'", do=did_you_mean(name, router_names()))
        make = point.load()
    signature = inspect.signature(make)
    needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    missing = [option for option in needed if option not in options]
    if missing and not set(options) - set(signature.parameters):
        raise CompositionError(
            f"router '{name}' needs {' and '.join(missing)}",
            do=" ".join(f"--{option.replace('_', '-')} ..." for option in missing)
            + f", or get_router('{name}', {', '.join(f'{option}=...' for option in missing)})",
        )
    try:
        signature.bind(**options)
    except TypeError as error:
        fields = getattr(getattr(make, "func", make), "__dataclass_fields__", {})
        raise CompositionError(
            f"router '{name}' does not take these options: {', '.join(options) or 'none'}",
            expected=f"some of: {', '.join(fields)}" if fields else str(error),
        ) from error
    return adapted(make(**options))
