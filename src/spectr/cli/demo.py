"""``spectr demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from spectr.cli.console import out, say
from spectr.cli.options import Routing, check_target, with_options


@with_options
def demo(
    routing: Routing,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Write the picture and the page to this folder.")] = Path(
        "out"
    ),
) -> None:
    """Ask the base model and the routed model one question of each task, and draw which experts were used.

    Writes a heat map (PNG) and a page (HTML) that shows the experts of every token and layer.
    """
    check_target(folder / "routing.png", ".png")
    found = routing.resolve()
    library, router, name = found.library, found.router, next(iter(found.routers))
    base, tokenizer = routing.base()

    from spectr.demo import demonstrate
    from spectr.plots import tints, write_heat_map, write_page
    from spectr.tasks import shipped_tasks

    shown = demonstrate(base, tokenizer, library, router, list(shipped_tasks().values()), allow=routing.allow, say=say)
    palette = tints(library.names)
    table = Table(title=f"{name}, top {router.selection.k or len(library)}, {len(library)} experts", expand=True)
    for column, ratio in (("task", 2), ("right answer", 3), ("base model", 5), ("routed model", 5), ("at work", 4)):
        table.add_column(column, ratio=ratio, overflow="fold")
    for row in shown:
        workers = "\n".join(
            f"[black on {palette[n]}]{n}[/] {share:.1%}" for n, share in row.routing.leaders[:3] if share
        )
        workers = workers or "[dim]base model[/]"
        task = row.task if row.expert else f"{row.task}\n[dim](no expert)[/]"
        before, after = _marked(row.base_answer, row.base_is_right), _marked(row.routed_answer, row.routed_is_right)
        table.add_row(task, _first(row.expected), before, after, workers)
    out.print(table)
    before, after = sum(row.base_is_right for row in shown), sum(row.routed_is_right for row in shown)
    out.print(
        f"Answers that begin with the right one: base model {before} of {len(shown)}, routed model {after}. One "
        "prompt for each task shows how it works; spectr evaluate measures how well.",
        highlight=False,
    )
    routings = [row.routing for row in shown]
    title = f"Experts at work on one prompt of each task ({name})"
    png = write_heat_map(routings, folder / "routing.png", title=title)
    page = write_page(routings, folder / "routing.html", title=title, subtitle=str(router))
    out.print(f"heat map: {png.resolve()}\npage:     {page.resolve()}", highlight=False)


def _marked(text: str, right: bool) -> str:
    mark = "[green]\u2713[/]" if right else "[red]\u2717[/]"
    return f"{mark} {_first(text)}"


def _first(text: str, limit: int = 60) -> str:
    from rich.markup import escape

    line = " ".join(text.split())
    return escape(line if len(line) <= limit else line[: limit - 1] + "\u2026")
