"""The lock of a library's folder, which each writer of it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from spectr.errors import LibraryError
from spectr.library.manifest import MANIFEST_FILE

_PATIENCE = 60  # seconds that a writer waits for another one


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        LibraryError: Another writer holds it for a minute.
    """
    try:
        with FileLock(root / ".lock", timeout=_PATIENCE):
            yield
    except Timeout as error:
        raise LibraryError(
            f"{root} is locked by another writer for {_PATIENCE} s; nothing was changed",
            do="try again after the other command ends",
        ) from error


@contextmanager
def locked_if_library(root: Path) -> Iterator[None]:
    """Hold the lock of a folder that is a library, while a file is written next to its experts.

    A library's writers delete all scratch files that they find, also that of the new file.
    """
    if not (root / MANIFEST_FILE).is_file():
        yield
        return
    with locked(root):
        yield
