"""Packages that import a name on first use."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, homes: Mapping[str, str], *, renamed: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """Make a package's ``__getattr__``.

    Args:
        package: Its ``__name__``.
        homes: For each name the submodule that defines it; ``""`` for a submodule.
        renamed: New names by old names; an old name works with a warning.
    """

    def find(name: str) -> Any:
        if renamed and name in renamed:
            warnings.warn(f"{package}.{name} is now {package}.{renamed[name]}", DeprecationWarning, stacklevel=2)
            return getattr(sys.modules[package], renamed[name])
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        home = import_module(f"{package}.{homes[name] or name}")
        value = getattr(home, name) if homes[name] else home
        setattr(sys.modules[package], name, value)
        return value

    return find
