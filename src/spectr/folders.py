"""Folders that are written: checked before any work, and then whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spectr.errors import SpectrError


def check_new_folder(
    out: Path,
    error: type[SpectrError],
    do: str = "choose another --out",
    *,
    overwrite: bool = False,
    inside: bool = False,
) -> None:
    """Raise ``error`` where no new folder can be written.

    Args:
        out: The folder.
        error: Type of the error.
        do: The next step, for the error.
        overwrite: Whether files that are there may be replaced.
        inside: Whether files are added to those that are there.
    """
    if out.exists() and not out.is_dir():
        raise error(f"{out} is a file", expected="a folder", do=do)
    if out.is_dir() and any(out.iterdir()) and not (overwrite or inside):
        raise error(f"{out} is in use", expected="an empty folder, or none yet", do=do)
    holders = (out.absolute(), *out.absolute().parents)[0 if inside else 1 :]
    above = next(folder for folder in holders if folder.exists())
    try:  # asking for the right to write is not enough: root has it on read-only file systems
        tempfile.TemporaryDirectory(dir=above).cleanup()
    except OSError as fault:
        raise error(f"{out} cannot be made: {above} takes no new folder ({fault.strerror})", do=do) from fault


@contextmanager
def new_folder(
    out: Path, error: type[SpectrError], do: str = "choose another --out", *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield an empty folder next to ``out`` that takes its place when the block ends; deleted where the block raises.

    Raises:
        SpectrError: As :func:`check_new_folder`.
    """
    check_new_folder(out, error, do, overwrite=overwrite)
    out = out.absolute()
    scratch = out.with_name(f".{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        _swap_in(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap_in(scratch: Path, out: Path) -> None:
    """Rename into place. The old folder is deleted only when the new one is there."""
    if not out.exists():
        scratch.rename(out)
        return
    old = Path(tempfile.mkdtemp(dir=scratch.parent, prefix=".replaced-"))
    out.rename(old / out.name)
    try:
        scratch.rename(out)
    except BaseException:
        (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def with_parents(path: str | Path) -> Path:
    """The path of a file that is to be written; the folders above it are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
