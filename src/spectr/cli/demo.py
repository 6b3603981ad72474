"""``spectr demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from spectr.cli.console import out, say
from spectr.cli.options import (
    DtypeOption,
    LibraryOption,
    ModelOption,
    RouterOption,
    TopKOption,
    make_router,
    open_library,
    open_model,
)


def demo(
    model: ModelOption = None,
    library: LibraryOption = None,
    router: RouterOption = "spectr",
    top_k: TopKOption = None,
    dtype: DtypeOption = "auto",
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("out"),
) -> None:
    """Ask the base model and the routed model one question of each task, and draw who did the work.

    Writes a heat map as PNG and a page as HTML that shows, for every token and layer, the experts at work.
    """
    experts = open_library(library)
    chosen = make_router(router, experts, top_k=top_k)
    base, tokenizer = open_model(model, dtype)

    from spectr.demo import demonstrate
    from spectr.plots import colours, write_heat_map, write_page
    from spectr.tasks import shipped_tasks

    shown = demonstrate(base, tokenizer, experts, chosen, list(shipped_tasks().values()), say=say)
    palette = colours(experts.names)
    table = Table(title=f"{router}, top {getattr(chosen, 'top_k', len(experts))}, {len(experts)} experts", expand=True)
    for column, ratio in (("task", 2), ("right answer", 3), ("base model", 5), ("routed model", 5), ("at work", 4)):
        table.add_column(column, ratio=ratio, overflow="fold")
    for row in shown:
        workers = "\n".join(f"[{palette[n]}]{n}[/] {share:.1%}" for n, share in row.routing.leaders[:3])
        table.add_row(row.task, _first(row.expected), _first(row.base_answer), _first(row.routed_answer), workers)
    out.print(table)
    routings = [row.routing for row in shown]
    title = f"Experts at work on one prompt of each task ({router})"
    png = write_heat_map(routings, folder / "routing.png", title=title)
    page = write_page(routings, folder / "routing.html", title=title, subtitle=str(chosen))
    out.print(f"heat map: {png.resolve()}\npage:     {page.resolve()}", highlight=False)


def _first(text: str, limit: int = 60) -> str:
    from rich.markup import escape

    line = " ".join(text.split())
    return escape(line if len(line) <= limit else line[: limit - 1] + "\u2026")
