"""Where the experts are that come with the package."""

from __future__ import annotations

from pathlib import Path

from spectr.errors import LibraryError


def shipped_experts() -> Path:
    """Folder of the shipped experts, in an installed package or in a checkout of the repository.

    Raises:
        LibraryError: This installation came without them.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "shipped_experts", here.parents[1] / "experts"):
        if (folder / "manifest.json").is_file():
            return folder
    raise LibraryError(
        "this installation of spectr came without the shipped experts",
        do="name a library of your own with --library, or install from the repository",
    )
