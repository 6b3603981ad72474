"""The entries that define a library: one small file per expert, so that adding one costs the same in any library.

``manifest.json`` marks a folder as a library and holds its format. In format 2 each expert has ``entries/NAME.json``.
Format 1, which can still be read, has all entries in ``manifest.json``; the first change converts it to format 2.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from spectr.adapters import ADAPTER_FILES, CARD, CARD_DATA
from spectr.atomic_write import INCOMING, replacing
from spectr.errors import LibraryError, map_together
from spectr.hashing import file_sha256, json_sha256

MANIFEST_FILE = "manifest.json"
ENTRIES_FOLDER = "entries"
FORMAT = 2
DIGITS = 12  # of the hash, in the names of experts' folders
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
Read = TypeVar("Read", bound=BaseModel)


class Entry(BaseModel):
    """One expert of a library on disk.

    Attributes:
        name: The expert's name.
        folder: Its folder in the library, named after its content.
        sha256: Hex digests of the folder's files.
        ranks: The different ranks of its modules, ascending.
        modules: Number of modules that it adapts.
        targets: The different last parts of the modules' names.
        parameters: Number of parameters in its factors.
        base_model: The base model in its configuration.
        origin: Where it was added from.
        added: Time of adding, in UTC.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    folder: str
    sha256: dict[str, str]
    ranks: tuple[int, ...]
    modules: int
    targets: tuple[str, ...]
    parameters: int
    base_model: str | None = None
    origin: str = ""
    added: str = ""

    @field_validator("folder")
    @classmethod
    def _inside(cls, folder: str) -> str:
        if folder in ("", ".", "..") or set(folder) & set("/\\"):
            raise ValueError(f"{folder!r} is not a folder of this library")
        return folder


class _Manifest(BaseModel):
    """``manifest.json``; in format 1 it holds the entries, in alphabetical order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = 1
    experts: tuple[Entry, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_known_format(cls, data: Any) -> Any:
        found = data.get("format", 1) if isinstance(data, dict) else 1
        if found not in (1, FORMAT):
            raise ValueError(f"format {found} is not {FORMAT}: another version of spectr wrote it")
        return data

    @model_validator(mode="after")
    def _sorted_and_unique(self) -> _Manifest:
        names = [entry.name for entry in self.experts or ()]
        if names != sorted(set(names)):
            raise ValueError("names of experts must be different and in alphabetical order")
        if self.format != 1 and self.experts is not None:
            raise ValueError(f"in format {self.format} entries are files in {ENTRIES_FOLDER}")
        return self


def read_entries(root: Path) -> tuple[Entry, ...]:
    """All experts' entries, in alphabetical order; empty if there is no library yet.

    Raises:
        LibraryError: Files are damaged or in another format; lists all of them.
    """
    first_format = _first_format(root)
    names = sorted(_names(root, first_format))
    entries = map_together(f"{root} is damaged", lambda name: _entry(root, first_format, name), names, LibraryError)
    return tuple(entry for entry in entries if entry)  # some may be deleted since the folder was listed


def read_entry(root: Path, name: str) -> Entry | None:
    """The entry of one expert, independent of others; ``None`` if there is no such expert.

    Raises:
        LibraryError: The entry is damaged, or the library has another format.
    """
    return _entry(root, _first_format(root), name)


def has_entry(root: Path, name: str) -> bool:
    """Whether an expert of that name exists, even if its entry is damaged."""
    first_format = _first_format(root)
    if first_format is not None:
        return name in first_format
    return NAME.fullmatch(name) is not None and (root / ENTRIES_FOLDER / f"{name}.json").is_file()


def entry_names(root: Path) -> list[str]:
    """Names of all experts, in alphabetical order, even if their entries are damaged."""
    return sorted(_names(root, _first_format(root)))


def any_entry(root: Path, *, but: str) -> Entry | None:
    """The entry of any expert with a name other than ``but``, without reading the others."""
    first_format = _first_format(root)
    for name in _names(root, first_format):
        with suppress(LibraryError):  # damage of one does not matter to others
            entry = _entry(root, first_format, name) if name != but else None
            if entry:
                return entry
    return None


def begin(root: Path) -> None:
    """Make a folder an empty library."""
    (root / ENTRIES_FOLDER).mkdir(exist_ok=True)
    _write(root, MANIFEST_FILE, _Manifest(format=FORMAT))


def write_entry(root: Path, entry: Entry) -> None:
    """Add or replace an expert's entry. After a kill at any moment it is the old one or the new one."""
    _upgrade(root)
    _write(root, f"{ENTRIES_FOLDER}/{entry.name}.json", entry)


def drop_entry(root: Path, name: str) -> None:
    """Remove an expert's entry."""
    _upgrade(root)
    (root / ENTRIES_FOLDER / f"{name}.json").unlink(missing_ok=True)


def _upgrade(root: Path) -> None:
    """Convert a library of format 1 to this format; replacing the manifest is the decisive step."""
    first_format = _first_format(root)
    if first_format is None:
        return
    scratch = Path(tempfile.mkdtemp(dir=root, prefix=INCOMING))
    for name, entry in first_format.items():
        _write(root, f"{scratch.name}/{name}.json", entry)
    shutil.rmtree(root / ENTRIES_FOLDER, ignore_errors=True)  # left by an interrupted conversion
    scratch.chmod(0o755)
    scratch.rename(root / ENTRIES_FOLDER)
    begin(root)


def _write(root: Path, file: str, model: BaseModel) -> None:
    with replacing(root / file, scratch_in=root) as scratch:
        scratch.write_text(model.model_dump_json(indent=1, exclude_none=True) + "\n", encoding="utf-8")


def _names(root: Path, first_format: Mapping[str, Entry] | None) -> Iterator[str]:
    """Names of the experts in no order, one at a time."""
    if first_format is not None:
        yield from first_format
        return
    try:
        with os.scandir(root / ENTRIES_FOLDER) as files:
            yield from (file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))
    except OSError as error:
        raise LibraryError(
            f"{root / ENTRIES_FOLDER} cannot be read: {error.strerror or error}",
            expected="a folder with an entry for each expert, as 'spectr library add' writes it",
            do="restore it, or build the library again with 'spectr library add'",
        ) from error


def _first_format(root: Path) -> Mapping[str, Entry] | None:
    """The entries of a format 1 library by name; empty if there is no library; ``None`` for the current format."""
    if not (root / MANIFEST_FILE).is_file():
        return {}
    repair = "restore the file, or build the library again with 'spectr library add'"
    found = _read(root / MANIFEST_FILE, _Manifest, "a library manifest", repair)
    return None if found.format == FORMAT else {entry.name: entry for entry in found.experts or ()}


def _entry(root: Path, first_format: Mapping[str, Entry] | None, name: str) -> Entry | None:
    if first_format is not None:
        return first_format.get(name)
    path = root / ENTRIES_FOLDER / f"{name}.json"
    if not NAME.fullmatch(name) or not path.is_file():
        return None
    repair = f"add the expert again: spectr library add {name} ADAPTER --library {root} --replace; or remove it"
    entry = _read(path, Entry, "an expert's entry", repair)
    if entry.name != name:
        raise LibraryError(f"{path} is the entry of '{entry.name}'", do="rename the file to its old name")
    return entry


def _read(path: Path, model: type[Read], what: str, repair: str) -> Read:
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise LibraryError(f"{path} cannot be read: {error.strerror or error}", do="check its permissions") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise LibraryError(
            f"{path} is not {what}: {place and place + ': '}{first['msg']}",
            expected=f"format {FORMAT}, as 'spectr library add' writes it",
            do=repair,
        ) from error


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 of each of an expert's files in a folder, by name."""
    return {file: file_sha256(folder / file) for file in ADAPTER_FILES if (folder / file).is_file()}


def without_card(digests: Mapping[str, str]) -> dict[str, str]:
    """The digests of all files but the card."""
    return {file: digest for file, digest in digests.items() if file not in (CARD, CARD_DATA)}


def content_digits(digests: dict[str, str]) -> str:
    """The part of a folder's name that its content determines."""
    return json_sha256(digests)[:DIGITS]
