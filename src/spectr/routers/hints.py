"""Types of settings, from annotations."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

_NONE = type(None)


class Unresolved(NamedTuple):
    """Replaces a type whose annotation cannot be resolved; holds the reason."""

    cause: str


def hints_of(make: Callable[..., Any]) -> dict[str, Any]:
    """The type of each parameter. Annotations are resolved separately: a failing one does not affect others."""
    source: Any = inspect.unwrap(make.func if isinstance(make, partial) else make)
    if is_dataclass(source):
        return {
            name: _resolved(hint, vars(sys.modules[owner.__module__]), vars(owner))
            for owner in reversed(inspect.getmro(source))  # pyright: ignore[reportArgumentType]
            for name, hint in inspect.get_annotations(owner).items()
        }
    function = source.__init__ if inspect.isclass(source) else source
    names = getattr(function, "__globals__", {})
    return {name: _resolved(hint, names, {}) for name, hint in inspect.get_annotations(function).items()}


def _resolved(hint: Any, names: dict[str, Any], local: Mapping[str, Any]) -> Any:
    holder = type("_", (), {"__annotations__": {"it": hint}})
    try:
        return get_type_hints(holder, names, dict(local))["it"]
    except Exception as error:  # a name that exists only for type checkers, or any other error of evaluation
        return Unresolved(f"{type(error).__name__}: {error}")


def kinds(hint: Any) -> list[Any]:
    """The members of a union, with text last."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return sorted(parts, key=lambda part: (part is str, part is not _NONE))
