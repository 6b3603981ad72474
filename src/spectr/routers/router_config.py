"""Routers, evidence and uses as plain data for files: a name and the settings that differ from its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from spectr.errors import CompositionError
from spectr.routers.registries import PARTS, make_part
from spectr.routers.router import Router


def router_config(router: Router) -> dict[str, Any]:
    """``{"name": ..., setting: value, ...}``; :func:`spectr.get_router` makes an equal router from it.

    All values are JSON values. A router, evidence or use inside a router is such a dictionary too.

    Raises:
        CompositionError: No known name makes such a router, or a setting is not a plain value.
    """
    return part_config(router)


def part_config(part: Any) -> dict[str, Any]:
    """See :func:`router_config`; for a router, evidence or a use."""
    kind = next(kind for kind in PARTS if isinstance(part, kind))
    registry = PARTS[kind]
    settings = {f.name: getattr(part, f.name) for f in fields(part)} if is_dataclass(part) else {}
    for names in (registry.entries, [name for name in registry.names() if name not in registry.entries]):
        found = [config for name in names if (config := _named(kind, name, part, settings))]
        if found:
            own_first = sorted(found, key=lambda c: (c["name"] != type(part).__name__.lower(), c["name"]))
            return {key: _plain(part, key, value) for key, value in min(own_first, key=len).items()}
    raise CompositionError(
        f"{part!r} has no registered name",
        expected=f"a {registry.kind} with a registered name, as for spectr.get_router",
        do=f"declare an entry point of the group {registry.group}",
    )


def _named(kind: type, name: str, part: Any, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config under a name, if that name makes an equal part. A package's maker may do anything else."""
    try:
        plain = make_part(kind, name, {})
    except CompositionError:
        plain = None
    except Exception:
        return None
    by_default = {f.name: f.default for f in fields(part)} if plain is None and is_dataclass(part) else {}
    kept = {key: value for key, value in settings.items() if getattr(plain, key, by_default.get(key, ...)) != value}
    try:
        return {"name": name, **kept} if make_part(kind, name, kept) == part else None
    except Exception:
        return None


def _plain(part: Any, key: str, value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (tuple, list)) and all(isinstance(one, (str, int, float, bool)) for one in value):
        return list(value)
    if isinstance(value, tuple(PARTS)):
        return part_config(value)
    raise CompositionError(
        f"{part!r} cannot be saved: {key} is not a plain value",
        expected="a router whose settings are texts and numbers",
    )
