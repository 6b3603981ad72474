"""What the tests of a library on disk look at."""

from pathlib import Path

from spectr.library import ExpertLibrary, LibraryStore

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def names(root: Path) -> tuple[str, ...]:
    return ExpertLibrary.open(root).names


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()}


def assert_sound(store: LibraryStore, *expected: str) -> None:
    """A fresh look finds these experts, without a fault, and no folder that does not count."""
    fresh = LibraryStore(store.root)
    assert names(store.root) == expected
    assert fresh.verify() == dict.fromkeys(expected)
    assert folders(store.root) == {entry.folder for entry in fresh.entries}
