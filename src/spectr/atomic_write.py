"""Where files go, and writing them so that others can read them, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

# What a killed writer leaves begins so, files and folders; a library sweeps it up.
SCRATCH, INCOMING = ".manifest-", ".incoming-"


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$SPECTR_CACHE``, ``$XDG_CACHE_HOME/spectr`` or ``~/.cache/spectr``."""
    if folder := os.environ.get("SPECTR_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectr"


def save_readable(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; safetensors itself makes it readable by its owner alone."""
    save_file(dict(tensors), path, metadata=dict(metadata))
    path.chmod(0o644)


@contextmanager
def replacing(target: Path, scratch_in: Path | None = None) -> Iterator[Path]:
    """Yield a scratch path to write to, which takes the target's place when the block ends.

    After a kill or a power cut at any moment the target is the old file or the new one. Where the block raises, the
    scratch file goes and the target stays.

    Args:
        target: The file.
        scratch_in: Folder of the scratch path, on the same file system; by default the target's.
    """
    descriptor, name = tempfile.mkstemp(dir=scratch_in or target.parent, prefix=SCRATCH)
    os.close(descriptor)
    scratch = Path(name)
    try:
        yield scratch
        sync_file(scratch)
        scratch.chmod(0o644)
        scratch.replace(target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_file(path: Path) -> None:
    """Make a file's content last through a power cut."""
    with path.open("r+b") as written:
        os.fsync(written.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder last through a power cut, where the file system can."""
    with suppress(OSError):  # the rename itself was made; not every file system syncs folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
