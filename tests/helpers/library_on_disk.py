"""What the tests of a library on disk look at."""

import json
import shutil
from pathlib import Path
from typing import Any

from spectr.library import ExpertLibrary, LibraryStore

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def names(root: Path) -> tuple[str, ...]:
    return ExpertLibrary.open(root).names


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()} - {"entries", "index"}


def read_entry(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / "entries" / f"{name}.json").read_text())


def write_entry(root: Path, name: str, **changed: Any) -> None:
    """An expert's entry with other values, whether they are right or not."""
    (root / "entries" / f"{name}.json").write_text(json.dumps({**read_entry(root, name), **changed}))


def to_first_format(root: Path) -> None:
    """Make a library one of format 1, whose manifest has all entries."""
    entries = [read_entry(root, entry.name) for entry in LibraryStore(root).entries]
    (root / "manifest.json").write_text(json.dumps({"format": 1, "experts": entries}))
    shutil.rmtree(root / "entries")


def assert_sound(store: LibraryStore, *expected: str) -> None:
    """A fresh look finds these experts, without a fault, and no folder that does not count."""
    fresh = LibraryStore(store.root)
    assert names(store.root) == expected
    assert fresh.verify() == dict.fromkeys(expected)
    assert folders(store.root) == {entry.folder for entry in fresh.entries}
