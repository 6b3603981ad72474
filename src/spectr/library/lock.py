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
def beside_experts(root: Path) -> Iterator[None]:
    """Hold the lock while a further file is written into a library's folder.

    Its writers delete all scratch files that they find, so that this one's must not be seen. A folder that is no
    library has no such writers.
    """
    if not (root / MANIFEST_FILE).is_file():
        yield
        return
    with locked(root):
        yield
