"""Routers as plain data, for files: a name and the settings that differ from its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from spectr.errors import CompositionError
from spectr.routers.base import Router
from spectr.routers.registry import ROUTERS, get_router, router_names


def router_config(router: Router) -> dict[str, Any]:
    """``{"name": ..., setting: value, ...}``, which gives an equal router with :func:`spectr.get_router`.

    All values are JSON's own. A router inside a router is such a dictionary, too.

    Raises:
        CompositionError: No known name gives such a router, or a setting is no plain value.
    """
    settings = {f.name: getattr(router, f.name) for f in fields(router)} if is_dataclass(router) else {}
    for names in (ROUTERS.entries, [name for name in router_names() if name not in ROUTERS.entries]):
        found = [config for name in names if (config := _named(name, router, settings))]
        if found:
            own_first = sorted(found, key=lambda c: (c["name"] != type(router).__name__.lower(), c["name"]))
            return {key: _plain(router, key, value) for key, value in min(own_first, key=len).items()}
    raise CompositionError(
        f"{router!r} has no name",
        expected="a router that spectr.get_router makes",
        do="declare an entry point of the group spectr.routers",
    )


def _named(name: str, router: Router, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config under a name, if that name gives such a router. A package's router may do anything but that."""
    try:
        plain = get_router(name)
    except CompositionError:
        plain = None
    except Exception:
        return None
    kept = {key: value for key, value in settings.items() if plain is None or getattr(plain, key, ...) != value}
    try:
        return {"name": name, **kept} if get_router(name, **kept) == router else None
    except Exception:
        return None


def _plain(router: Router, key: str, value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (tuple, list)) and all(isinstance(part, (str, int, float, bool)) for part in value):
        return list(value)
    if isinstance(value, Router):
        return router_config(value)
    raise CompositionError(
        f"{router!r} cannot be written down: {key} is no plain value",
        expected="a router whose settings are texts and numbers",
    )
