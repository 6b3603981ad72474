"""The playground page: installed static files."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from spectr.serving.errors import RefusalError


def find_page() -> Path | None:
    """The folder of the page's files."""
    folder = Path(__file__).parent / "playground"
    return folder if (folder / "index.html").is_file() else None


def page_file(folder: Path | None, name: str) -> tuple[bytes, str]:
    """One of the page's files, with its content type.

    Raises:
        RefusalError: 404: there is no file of this name.
    """
    path = (folder / (name or "index.html")).resolve() if folder else None
    if path is None or folder is None or not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise RefusalError(f"there is no page '{name}'", code="not_found", status=404)
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return path.read_bytes(), f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
