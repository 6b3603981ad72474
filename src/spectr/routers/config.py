"""Routers as plain data, for files: a name and the settings that differ from its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from spectr.errors import CompositionError
from spectr.routers.base import Router
from spectr.routers.registry import get_router, router_names


def router_config(router: Router) -> dict[str, Any]:
    """``{"name": ..., setting: value, ...}``, which gives an equal router with :func:`spectr.get_router`.

    Raises:
        CompositionError: No known name gives such a router, or a setting is no plain value.
    """
    settings = {f.name: getattr(router, f.name) for f in fields(router)} if is_dataclass(router) else {}
    odd = [name for name, value in settings.items() if not isinstance(value, (str, int, float, bool, type(None)))]
    if odd:
        raise CompositionError(
            f"{router!r} cannot be written down: {', '.join(odd)} is no plain value",
            expected="a router whose settings are texts and numbers",
        )
    found = []
    for name in sorted(router_names(), key=lambda name: (name != type(router).__name__.lower(), name)):
        plain = _made(name, {})
        kept = {key: value for key, value in settings.items() if plain is None or getattr(plain, key, ...) != value}
        if _made(name, kept) == router:
            found.append({"name": name, **kept})
    if found:
        return min(found, key=len)
    raise CompositionError(
        f"{router!r} has no name",
        expected="a router that spectr.get_router makes",
        do="declare an entry point of the group spectr.routers",
    )


def _made(name: str, options: Mapping[str, Any]) -> Router | None:
    try:
        return get_router(name, **options)
    except CompositionError:
        return None
