"""The experts that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spectr.errors import LibraryError

if TYPE_CHECKING:
    from spectr.library import ExpertLibrary


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


def open_library(path: Path | None) -> ExpertLibrary:
    """The library at that path, or the shipped one.

    Raises:
        LibraryError: There is none, or it is empty.
    """
    from spectr.library import ExpertLibrary

    library = ExpertLibrary.open(path or shipped_experts())
    if not len(library):
        raise LibraryError(
            f"{library.origin} is an empty library", do=f"spectr library add NAME ADAPTER --library {library.origin}"
        )
    return library
