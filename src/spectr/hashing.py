"""Hashes of files and versions of packages, for manifests and cards."""

from __future__ import annotations

import hashlib
import json
import platform
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file, which is read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(content: Any) -> str:
    """Hex SHA-256 of plain data as JSON, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def known_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, cached while its size and modification time stay the same."""
    state = Path(path).stat()
    return _remembered(Path(path).absolute(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=16384)
def _remembered(path: Path, _size: int, _changed: int) -> str:
    return file_sha256(path)


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the installed ones among these distributions."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
