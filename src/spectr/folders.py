"""Write folders: check them before any work, then write all or nothing; and read their JSON files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectr.errors import SpectrError


def check_new_folder(
    out: Path,
    error: type[SpectrError],
    do: str = "choose another --out",
    *,
    overwrite: bool = False,
    inside: bool = False,
) -> None:
    """Raise ``error`` if no new folder can be written at this path.

    Args:
        out: The folder.
        error: Type of the error.
        do: The next step, for the error.
        overwrite: Whether existing files may be replaced.
        inside: Whether files are added to existing ones.
    """
    if out.exists() and not out.is_dir():
        raise error(f"{out} is a file", expected="a folder", do=do)
    if out.is_dir() and any(out.iterdir()) and not (overwrite or inside):
        raise error(f"{out} is not empty", expected="an empty folder or a new one", do=do)
    holders = (out.absolute(), *out.absolute().parents)[0 if inside else 1 :]
    above = next(folder for folder in holders if folder.exists())
    try:  # a test of permissions is not enough: root passes it on a read-only file system
        tempfile.TemporaryDirectory(dir=above).cleanup()
    except OSError as fault:
        raise error(f"{out} cannot be created in {above}: {fault.strerror}", do=do) from fault


@contextmanager
def new_folder(
    out: Path, error: type[SpectrError], do: str = "choose another --out", *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield an empty folder next to ``out``. When the block ends, it replaces ``out``; if the block raises, it is
    deleted.

    Raises:
        SpectrError: See :func:`check_new_folder`.
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
    """Rename into place. The old folder is deleted only after the new one exists."""
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
    """The path of a file to write; creates the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file, or it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ValueError: JSON's own error, and text that is not UTF-8
        return {}
    return found if isinstance(found, dict) else {}
