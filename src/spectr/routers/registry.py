"""Routers by name: every combination that the papers use, and what other packages add (:mod:`spectr.registry`)."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from spectr.errors import CompositionError
from spectr.registry import Registry, entry
from spectr.routers.base import PROTOCOL, Router
from spectr.routers.version1 import adapted_maker

_SPECTR, _CALIBRATED = "spectr.routers.spectr:Spectr", "spectr.routers.calibrated:Calibrated"
_GLIDER, _UNIFORM = "spectr.routers.glider:Glider", "spectr.routers.uniform:Uniform"

ROUTERS: Registry[Router] = Registry(
    kind="router",
    group="spectr.routers",
    error=CompositionError,
    protocol=PROTOCOL,
    adapters={1: adapted_maker},
    as_text=lambda _, options: " ".join(f"--set {option}" for option in options),
    entries={
        "spectr": _SPECTR,
        "spectr-paper": entry(_SPECTR, combine="factors"),
        "spectr-softmax": entry(_SPECTR, weights="softmax"),
        "spectr-projection": entry(_SPECTR, score="projection"),
        "spectr-code": entry(_SPECTR, score="projection", combine="factors"),
        "calibrated": _CALIBRATED,
        "calibrated-prior": entry(_CALIBRATED, level="prior"),
        "calibrated-token": entry(_CALIBRATED, level="token", top_k=4),
        "arrow": "spectr.routers.arrow:Arrow",
        "phatgoose": "spectr.routers.phatgoose:Phatgoose",
        "glider": _GLIDER,
        "glider-global": entry(_GLIDER, local=None),
        "glider-spectr": entry(_GLIDER, local=entry(_SPECTR, top_k=1)),
        "lag": "spectr.routers.lag:Lag",
        "seqr": "spectr.routers.seqr:Seqr",
        "shortlist": "spectr.routers.shortlist:Shortlist",
        "mu": _UNIFORM,
        "uniform": _UNIFORM,
        "oracle": "spectr.routers.oracle:Oracle",
    },
)


def router_names() -> tuple[str, ...]:
    """All names that :func:`get_router` knows, in alphabetical order."""
    return ROUTERS.names()


def get_router(name: str, **options: Any) -> Router:
    """A router by name.

    Args:
        name: One of :func:`router_names`.
        options: Its settings, as in ``top_k=2``. A router inside a router may be plain data, such as
            ``{"name": "spectr", "top_k": 2}``.

    Raises:
        CompositionError: The name or an option is unknown, an option's value is out of range, or what a package adds
            makes no router.
    """
    fields = signature(ROUTERS.load(name)).parameters if any(isinstance(v, list) for v in options.values()) else {}
    lists = {key for key, field in fields.items() if "list[" in str(field.annotation)}
    made: object = ROUTERS.make(name, **{k: v if k in lists else _from_data(v) for k, v in options.items()})
    if not isinstance(made, Router):
        raise CompositionError(
            f"{ROUTERS.described(name)} makes an object of the type {type(made).__name__}",
            expected="a spectr.routers.Router",
            do="repair or uninstall that package",
        )
    return made


def _from_data(value: Any) -> Any:
    if isinstance(value, Mapping) and "name" in value:
        return get_router(**value)
    return tuple(value) if isinstance(value, list) else value
