"""``spectr evaluate`` and ``spectr report``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from spectr.cli.asked import COMPARING, ORDER, Asked
from spectr.cli.console import bar, out, resumable, say
from spectr.cli.opened import open_model
from spectr.cli.options import BaseOption, DataRootOption, DtypeOption, JsonOption, LettersOption, LibraryOption
from spectr.errors import DataError, SpectrError, did_you_mean
from spectr.routers import router_names
from spectr.shipped import open_library

if TYPE_CHECKING:
    from spectr.evaluation.experiments import Result

Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder of the results; a killed run goes on there.")]
_OTHERS = "Other experts"


def evaluate(
    experiment: Annotated[str, typer.Argument(help=f"{', '.join(ORDER)}, or all.")],
    folder: Folder = Path("out/evaluation"),
    model: BaseOption = None,
    library: LibraryOption = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="A shipped task or a task file; the default is all shipped ones.")
    ] = None,
    data_root: DataRootOption = None,
    letters: LettersOption = False,
    router: Annotated[
        list[str] | None, typer.Option("--router", "-r", help="Compare only these; give it once for each.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Test examples of each task at most.", min=2)] = None,
    seeds: Annotated[
        int, typer.Option(help="Measure calibrated routers with so many calibrations of their own; 0: the library's.")
    ] = 0,
    writer: Annotated[
        str | None,
        typer.Option(
            help="Who writes GLIDER's instructions: a model, http(s)://host/v1#MODEL, none; or the base model."
        ),
    ] = None,
    ranks: Annotated[
        Path | None,
        typer.Option(help='Of "ranks": a folder of adapters EXPERT-rRANK, as sst2-r16.', rich_help_panel=_OTHERS),
    ] = None,
    companion: Annotated[
        list[str] | None,
        typer.Option(help='Of "robustness": an adapter in an expert\'s place, EXPERT=FOLDER.', rich_help_panel=_OTHERS),
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run one of the paper's experiments, or all: a table, a figure, and results with their origin as JSON.

    Examples that were scored are kept, so that a run that was killed goes on where it stopped.

    [dim]spectr evaluate routing --data-root data --limit 50[/]
    [dim]spectr evaluate quality --data-root hub --task sst2[/]
    """
    _check_routers(router or ())
    asked = Asked.read(
        experiment,
        open_library(library),
        tasks=task or (),
        data_root=data_root,
        letters=letters,
        limit=limit,
        ranks=ranks,
        companions=companion or (),
    )
    for remark in asked.remarks:
        say(remark)
    if router and not set(asked.experiments) & COMPARING:
        say(f"--router makes no difference: {experiment} compares no routers")
    given = {
        "data-root": data_root,
        "model": model,
        "library": library,
        "task": task,
        "letters": letters,
        "router": router,
        "limit": limit,
        "seeds": seeds,
        "writer": writer,
        "ranks": ranks,
        "companion": companion,
        "dtype": None if dtype == "auto" else dtype,
    }
    _ = asked.library.calibration
    base, tokenizer = open_model(model, dtype)

    from spectr.cli.guides import guide_maker
    from spectr.evaluation.experiments import EXPERIMENTS, Bench

    guide = guide_maker(base, tokenizer, writer, dtype)

    for name in asked.experiments:
        with resumable(), bar() as advance:
            bench = Bench(
                model=base,
                tokenizer=tokenizer,
                library=asked.library,
                tasks=asked.tasks,
                reworded=asked.reworded,
                folder=folder,
                only=tuple(router or ()),
                seeds=tuple(range(seeds)),
                ranks=asked.ranks,
                companions=asked.companions,
                held_out=asked.held_out,
                guide=guide,
                progress=advance,
            )
            bench.check()
            made = EXPERIMENTS.load(name)(bench)
        if not made.rows and len(asked.experiments) == 1:
            reasons = [note for note in made.notes if note.startswith("Left out")]
            raise DataError(
                f"{name}: no router is left. {' '.join(reasons)}", do="give what is lacking, or other routers"
            )
        result = dataclasses.replace(made, origin={**made.origin, "command": _command(name, given)})
        if _replaces_other(folder / f"{name}.json", result):
            before = (folder / f"{name}.json").replace(folder / f"{name}.before.json")
            say(f"another run's result of {name} is kept as {before}")
        path = result.save(folder)
        if as_json:
            sys.stdout.write(path.read_text(encoding="utf-8").replace("\n", " ") + "\n")
        else:
            _show(result)
        say(f"results: {path.resolve()}")


def _check_routers(names: Sequence[str]) -> None:
    """Raise :class:`DataError` for names that are no routers, or routers that need to be told more than a name."""
    from spectr.routers import get_router

    for name in names:
        if name not in router_names():
            raise DataError(f"unknown router '{name}'", do=did_you_mean(name, router_names()))
        try:
            get_router(name)
        except SpectrError as error:
            raise DataError(
                f"router '{name}' cannot be compared: {error.given}",
                do="leave it out; 'quality' has each task's own expert",
            ) from error


def report(
    folder: Folder = Path("out/evaluation"),
    page: Annotated[Path | None, typer.Option(help="The page; by default report.html in that folder.")] = None,
) -> None:
    """Draw all results of a folder into one self-contained HTML page.

    [dim]spectr evaluate all --data-root data --limit 50 && spectr report[/]
    """
    from spectr.evaluation.experiments import Result
    from spectr.evaluation.summary import summary, tradeoff
    from spectr.plots.report import write_report

    found = [folder / f"{name}.json" for name in ORDER if (folder / f"{name}.json").is_file()]
    if not found:
        raise DataError(f"{folder} holds no results", do="run spectr evaluate all first, with the same --out")
    results: list[Result] = []
    for path in found:
        try:
            results.append(Result.load(path))
        except (json.JSONDecodeError, TypeError) as error:
            raise DataError(
                f"{path} is no result of spectr evaluate ({error})", do="delete it and run again"
            ) from error
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


def _command(experiment: str, given: dict[str, Any]) -> str:
    """What gives this result again; of folders and files only the last part of their path."""
    words = ["spectr", "evaluate", experiment]
    of_others = {"ranks": "ranks", "companion": "robustness"}
    for option, value in given.items():
        if not value or of_others.get(option, experiment) != experiment:
            continue
        for one in value if isinstance(value, list) else [value]:
            name, equals, path = str(one).rpartition("=")
            words += [f"--{option}"] if one is True else [f"--{option}", name + equals + Path(path).name]
    return " ".join(words)


def _replaces_other(path: Path, result: Result) -> bool:
    """Whether a result on disk is of other tasks, experts or settings."""
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8"))["origin"] != json.loads(json.dumps(result.origin))
    except (json.JSONDecodeError, KeyError, TypeError):
        return True


def _show(result: Result) -> None:
    table = Table(title=f"{result.title} ({result.source})")
    for number, column in enumerate(result.columns):
        table.add_column(str(column), justify="left" if number == 0 else "right")
    for row in result.rows:
        table.add_row(*map(str, row))
    out.print(table)
    for note in result.notes:
        out.print(note, style="dim", markup=False, highlight=False)
