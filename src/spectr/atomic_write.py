"""Write files so that other processes see the old file or the new one, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

# Scratch files and folders begin with this. A library deletes those that a killed process left behind.
SCRATCH, INCOMING = ".manifest-", ".incoming-"


def cache_folder() -> Path:
    """The cache folder: ``$SPECTR_CACHE``, ``$XDG_CACHE_HOME/spectr`` or ``~/.cache/spectr``."""
    if folder := os.environ.get("SPECTR_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectr"


def save_readable(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that all users can read; safetensors itself makes it private."""
    save_file(dict(tensors), path, metadata=dict(metadata))
    path.chmod(0o644)


@contextmanager
def replacing(target: Path, scratch_in: Path | None = None) -> Iterator[Path]:
    """Yield a scratch path to write to. When the block ends, it replaces the target.

    After a kill or a power cut at any moment, the target is the old file or the new one. If the block raises, the
    scratch file is deleted and the target stays.

    Args:
        target: The file to write.
        scratch_in: Folder of the scratch path, on the same file system. By default the target's folder.
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
    """Flush a file's content to disk, so that it survives a power cut."""
    with path.open("r+b") as written:
        os.fsync(written.fileno())


def sync_folder(folder: Path) -> None:
    """Flush renames in a folder to disk, if the file system supports it."""
    with suppress(OSError):  # the rename was made; not every file system syncs folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
