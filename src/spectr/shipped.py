"""Where the shipped experts are."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from spectr.errors import LibraryError, MissingExtraError

DISTRIBUTION = "spectr-lora-experts"
_FOLDER = "spectr_experts"  # in site-packages; a package of data without code
_REPOSITORY = Path(__file__).resolve().parents[2]

if TYPE_CHECKING:
    from spectr.library import ExpertLibrary


def shipped_experts() -> Path:
    """Folder of the shipped experts: ``experts/`` in a checkout of the repository, else the installed distribution's.

    Raises:
        MissingExtraError: This is no checkout, and ``spectr-lora-experts`` is not installed.
    """
    folder = _REPOSITORY / "experts"
    if (folder / "manifest.json").is_file() and (_REPOSITORY / "pyproject.toml").is_file():
        return folder
    try:
        folder = Path(str(distribution(DISTRIBUTION).locate_file(_FOLDER)))
    except PackageNotFoundError:
        raise MissingExtraError(
            "the library of shipped experts", "demo", instead="name your own library with --library"
        ) from None
    return folder


def open_library(path: Path | None) -> ExpertLibrary:
    """Open the library at this path, or the shipped one.

    Raises:
        LibraryError: The library does not exist or is empty.
    """
    from spectr.library import ExpertLibrary

    library = ExpertLibrary.open(path or shipped_experts())
    if not len(library):
        raise LibraryError(
            f"{library.origin} is an empty library", do=f"spectr library add NAME ADAPTER --library {library.origin}"
        )
    return library
