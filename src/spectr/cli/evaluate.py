"""``spectr evaluate`` and ``spectr report``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from spectr.cli.console import bar, interruptible, out, say
from spectr.cli.model_loading import check_writer, guide_maker, open_model
from spectr.cli.options import (
    BaseOption,
    DataRootOption,
    DtypeOption,
    JsonOption,
    LettersOption,
    LibraryOption,
    with_options,
)
from spectr.evaluation.experiments import EXPERIMENTS
from spectr.shipped import open_library

if TYPE_CHECKING:
    from spectr.evaluation.experiments.setup import Result, SideTable

Folder = Annotated[
    Path, typer.Option("--out", "-o", help="Write the results to this folder; an interrupted run resumes from it.")
]
_OTHERS = "Other experts"
_STOPPED = "stopped; the same command resumes from the results so far"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options that results depend on, in the order of the command that is stored with them."""

    data_root: DataRootOption = None
    model: BaseOption = None
    library: LibraryOption = None
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Use this shipped task or task file, repeatable; by default all shipped tasks."),
    ] = None
    letters: LettersOption = False
    router: Annotated[
        list[str] | None, typer.Option("--router", "-r", help="Compare only this router, repeatable.")
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Set a setting of the compared routers that have it: --set temperature=0.5.",
        ),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Limit the test examples of each task.", min=2)] = None
    seeds: Annotated[
        int,
        typer.Option(help="Calibrate N times for calibrated routers; 0 uses the library's calibration.", min=0),
    ] = 0
    writer: Annotated[
        str | None,
        typer.Option(
            help="Write GLIDER's instructions with this model, or http(s)://host/v1#MODEL; by default the base model.",
            callback=check_writer,
        ),
    ] = None
    ranks: Annotated[
        Path | None,
        typer.Option(
            help='Take the experts of "ranks" from this folder, named EXPERT-rRANK, such as sst2-r16.',
            rich_help_panel=_OTHERS,
        ),
    ] = None
    substitute: Annotated[
        list[str] | None,
        typer.Option(help='Replace an expert by this adapter in "robustness": EXPERT=FOLDER.', rich_help_panel=_OTHERS),
    ] = None
    companion: Annotated[list[str] | None, typer.Option(hidden=True)] = None
    dtype: DtypeOption = "auto"


@with_options
def evaluate(
    request: Request,
    experiment: Annotated[str, typer.Argument(help=f"Run {', '.join(EXPERIMENTS.entries)}, or all.")],
    folder: Folder = Path("out/evaluation"),
    as_json: JsonOption = False,
) -> None:
    """Run an experiment, or all, and write its table, its figure, and its results with their origin as JSON.

    Scored examples are kept, so that an interrupted run resumes.

    [dim]spectr evaluate routing --data-root data --limit 50[/]
    [dim]spectr evaluate quality --data-root hub --task sst2[/]
    """
    from spectr.evaluation.evaluation_plan import read_plan

    if request.companion:
        say("warning: --companion is deprecated and will be removed in the next version; use --substitute")
    plan = read_plan(
        experiment,
        open_library(request.library),
        tasks=request.task or (),
        data_root=request.data_root,
        letters=request.letters,
        limit=request.limit,
        ranks=request.ranks,
        substitutes=[*(request.substitute or ()), *(request.companion or ())],
        routers=request.router or (),
        settings=request.set or (),
    )
    for remark in plan.remarks:
        say(remark)
    base, tokenizer = open_model(request.model, request.dtype)

    from spectr.evaluation.experiment_runs import run_experiment

    guide = guide_maker(base, tokenizer, request.writer, request.dtype)
    given = {name.replace("_", "-"): value for name, value in vars(request).items() if value != "auto"}
    for name in plan.experiments:
        with interruptible(lambda: _STOPPED), bar() as advance:
            result = run_experiment(
                name, plan, base, tokenizer, folder=folder, seeds=request.seeds, guide=guide, progress=advance
            )
        _keep(result, folder, given, as_json)


def _keep(result: Result, folder: Path, given: dict[str, Any], as_json: bool) -> None:
    """Write a result and print it."""
    from spectr.evaluation.experiment_runs import keep_result

    path, before = keep_result(result, folder, given)
    if before:
        say(f"an earlier result of {result.name} was renamed to {before}")
    if as_json:
        sys.stdout.write(path.read_text(encoding="utf-8").replace("\n", " ") + "\n")
    else:
        _show(result)
    say(f"results: {path.resolve()}")


def report(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Read the results of this folder.")] = Path(
        "out/evaluation"
    ),
    page: Annotated[
        Path | None, typer.Option(help="Write the page to this file; by default report.html in that folder.")
    ] = None,
) -> None:
    """Write all results of a folder as one self-contained HTML page.

    [dim]spectr evaluate all --data-root data --limit 50 && spectr report[/]
    """
    from spectr.evaluation.experiment_runs import read_results, summary, tradeoff
    from spectr.plots.pages import write_report

    results = read_results(folder)
    together = [result for result in (summary(results), tradeoff(results)) if result]
    for result in together:
        _show(result)
    model = results[-1].origin.get("model", "")
    where = write_report(
        [*together, *results],
        page or folder / "report.html",
        title=f"SpectR on {model}: {len(results[-1].origin.get('experts', {}))} experts",
    )
    out.print(f"report: {where.resolve()}", highlight=False)


def _show(result: Result) -> None:
    _print(f"{result.title} ({result.source})", result)
    for table in result.more:
        _print(table.title, table)
    for note in result.notes:
        out.print(note, style="dim", markup=False, highlight=False)


def _print(title: str, cells: Result | SideTable) -> None:
    table = Table(title=title)
    for number, column in enumerate(cells.columns):
        table.add_column(str(column), justify="left" if number == 0 else "right")
    for row in cells.rows:
        table.add_row(*map(str, row))
    out.print(table)
