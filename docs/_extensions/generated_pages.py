"""Pages of the reference that are written from the code: Python, the command line, and settings of routers.

They go to ``docs/reference/generated``, which is not committed. A page is rewritten only where its text has changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from command_pages import command_page
from python_pages import python_pages
from router_pages import router_page

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER = Path("reference") / "generated"


def pages() -> dict[str, str]:
    """By path, relative to the folder, the text of each page."""
    return {**python_pages(), "command-line.md": command_page(), "router-settings.md": router_page()}


def write(docs: Path) -> None:
    """Write the pages, and delete those of names that are gone."""
    wanted = {docs / FOLDER / name: text for name, text in pages().items()}
    for path in (docs / FOLDER).rglob("*.md"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Have Sphinx write the pages before it looks for sources."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir)))
    return {"parallel_read_safe": True}
