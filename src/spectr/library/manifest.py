"""The manifest: the one file that decides what a library holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from spectr.errors import LibraryError
from spectr.saving import replacing

MANIFEST_FILE = "manifest.json"
FORMAT = 1


class Entry(BaseModel):
    """One expert of a library on disk.

    Attributes:
        name: The expert's name.
        folder: Its folder below the library, named after its content.
        sha256: Hex digests of the folder's files.
        ranks: The different ranks of its modules, ascending.
        modules: How many modules it adapts.
        targets: The different last parts of their names.
        parameters: Numbers in its factors.
        base_model: What it says it was trained on.
        origin: Where it was added from.
        added: When, in UTC.
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
            raise ValueError(f"{folder!r} is no folder of this library")
        return folder


class Manifest(BaseModel):
    """All experts of a library, in alphabetical order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    experts: tuple[Entry, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_this_format(cls, data: Any) -> Any:
        found = data.get("format", FORMAT) if isinstance(data, dict) else FORMAT
        if found != FORMAT:
            raise ValueError(f"format {found} is not {FORMAT}: it was written by another version of spectr")
        return data

    @model_validator(mode="after")
    def _sorted_and_unique(self) -> Manifest:
        names = [entry.name for entry in self.experts]
        if names != sorted(set(names)):
            raise ValueError("names of experts must be different and in alphabetical order")
        return self

    def with_entry(self, entry: Entry) -> Manifest:
        """This manifest with an expert more, or with one of that name replaced."""
        others = [other for other in self.experts if other.name != entry.name]
        return Manifest(experts=tuple(sorted([*others, entry], key=lambda e: e.name)))

    def without(self, name: str) -> Manifest:
        """This manifest with an expert less."""
        return Manifest(experts=tuple(entry for entry in self.experts if entry.name != name))


def read_manifest(root: Path) -> Manifest:
    """Read a library's manifest.

    Raises:
        LibraryError: It is not JSON, or not a manifest of this format.
    """
    path = root / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise LibraryError(f"{path} cannot be read: {error.strerror or error}", do="check its permissions") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise LibraryError(
            f"{path} is not a library manifest: {place and place + ': '}{first['msg']}",
            expected=f"format {FORMAT}, as 'spectr library add' writes it",
            do="restore the file, or build the library again with 'spectr library add'",
        ) from error


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step: after a kill at any moment it is the old or the new one."""
    with replacing(root / MANIFEST_FILE) as scratch:
        scratch.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
