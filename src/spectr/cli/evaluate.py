"""``spectr evaluate`` and ``spectr report``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from spectr.cli.console import bar, out, say
from spectr.cli.options import (
    DataRootOption,
    DtypeOption,
    JsonOption,
    LettersOption,
    LibraryOption,
    ModelOption,
    open_library,
    open_model,
)
from spectr.errors import DataError, LibraryError, did_you_mean, raise_together
from spectr.routers import router_names

if TYPE_CHECKING:
    from spectr.evaluation.experiments import Result
    from spectr.library import ExpertLibrary
    from spectr.tasks import Example, Task

ORDER = ("quality", "similarity", "routing", "wording", "robustness", "multitask", "costs")
Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder of the results; a killed run goes on there.")]


def evaluate(
    experiment: Annotated[str, typer.Argument(help=f"{', '.join(ORDER)}, or all.")],
    folder: Folder = Path("out/evaluation"),
    model: ModelOption = None,
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
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run one of the paper's experiments, or all: a table, a figure, and results with their origin as JSON.

    Examples that were scored are kept, so that a run that was killed goes on where it stopped.

    [dim]spectr evaluate routing --data-root data --limit 50[/]
    """
    if experiment not in (*ORDER, "all"):
        raise DataError(f"unknown experiment '{experiment}'", do=did_you_mean(experiment, (*ORDER, "all")))
    unknown = [name for name in router or () if name not in router_names()]
    if unknown:
        raise DataError(f"unknown router '{unknown[0]}'", do=did_you_mean(unknown[0], router_names()))
    experts = open_library(library)
    chosen = _tasks(task, letters) if experiment not in ("similarity", "costs") else []
    if task:
        _check_experts(chosen, experts)
    tasks = {about.name: (about, _examples(about, data_root, limit)) for about in chosen}
    reworded = {
        about.name: [_examples(about.reworded(i), data_root, limit) for i in range(len(about.paraphrases))]
        for about in chosen
    }
    if tasks and not any((about.expert or name) in experts for name, (about, _) in tasks.items()):
        raise DataError(
            f"none of the tasks ({', '.join(tasks)}) belongs to an expert of {experts.origin} "
            f"({', '.join(experts.names)})",
            do="name a task file whose 'expert' is in the library",
        )
    idle = [name for name, (about, _) in tasks.items() if (about.expert or name) not in experts]
    if idle:
        say(f"left out, as the library has no expert for them: {', '.join(idle)}")
    names = _names(experiment, any(reworded.values()), letters)
    _ = experts.calibration
    base, tokenizer = open_model(model, dtype)

    from spectr.evaluation.experiments import EXPERIMENTS, Bench

    for name in names:
        with bar() as advance:
            bench = Bench(
                model=base,
                tokenizer=tokenizer,
                library=experts,
                tasks=tasks,
                reworded=reworded,
                folder=folder,
                only=tuple(router or ()),
                progress=advance,
            )
            bench.check()
            made = EXPERIMENTS[name](bench)
        command = _command(name, limit, router, letters, data_root)
        result = dataclasses.replace(made, origin={**made.origin, "command": command})
        path = result.save(folder)
        if as_json:
            sys.stdout.write(path.read_text(encoding="utf-8").replace("\n", " ") + "\n")
        else:
            _show(result)
        say(f"results: {path.resolve()}")


def report(
    folder: Folder = Path("out/evaluation"),
    page: Annotated[Path | None, typer.Option(help="The page; by default report.html in that folder.")] = None,
) -> None:
    """Draw all results of a folder into one self-contained HTML page.

    [dim]spectr evaluate all --data-root data --limit 50 && spectr report[/]
    """
    from spectr.evaluation.experiments import Result
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
    model = results[-1].origin.get("model", "")
    where = write_report(
        results,
        page or folder / "report.html",
        title=f"SpectR on {model}: {len(results[-1].origin.get('experts', {}))} experts",
    )
    out.print(f"report: {where.resolve()}", highlight=False)


def _command(
    experiment: str, limit: int | None, routers: list[str] | None, letters: bool, data_root: str | None
) -> str:
    """What gives this result again, beside data, model and library."""
    words = ["spectr", "evaluate", experiment, *(["--limit", str(limit)] if limit else [])]
    words += [*(["--letters"] if letters else []), *(["--data-root", "hub"] if data_root == "hub" else [])]
    return " ".join([*words, *(f"-r {name}" for name in routers or ())])


def _tasks(names: list[str] | None, letters: bool) -> list[Task]:
    from spectr.tasks import Task, shipped_tasks

    found = list(shipped_tasks().values())
    if names:
        found = [Task.load(name) if name.endswith((".yaml", ".yml")) else Task.shipped(name) for name in names]
    return [task.lettered() for task in found] if letters else found


def _check_experts(tasks: list[Task], experts: ExpertLibrary) -> None:
    """Raise :class:`LibraryError` unless the library has the expert of each task that was named."""
    absent = [
        LibraryError(
            f"task '{task.name}' belongs to the expert '{task.expert or task.name}', which {experts.origin} does not "
            "have",
            expected=f"one of {', '.join(experts.names)}",
            do=f"add it with spectr library add {task.expert or task.name} ADAPTER, or name another 'expert' in the "
            "task's file",
        )
        for task in tasks
        if (task.expert or task.name) not in experts
    ]
    raise_together("tasks without an expert", absent, LibraryError)


def _names(experiment: str, reworded: bool, letters: bool) -> list[str]:
    """The experiments to run; "wording" needs tasks that have paraphrases."""
    names: list[str] = [*ORDER] if experiment == "all" else [experiment]
    if "wording" not in names or reworded:
        return names
    why = "lettered options have no paraphrases" if letters else "none of these tasks has paraphrases"
    if experiment == "wording":
        raise DataError(
            f"wording asks in other words, and {why}",
            do="leave out --letters" if letters else "add 'paraphrases' to a task's file",
        )
    say(f"wording is left out, as {why}")
    return [name for name in names if name != "wording"]


def _examples(task: Task, root: str | None, limit: int | None) -> list[Example]:
    from spectr.tasks import data_source, read_examples

    source = data_source(task, "test", root)
    if source is None:
        raise DataError(f"task '{task.name}' names no test data", do="add 'test' to its file")
    return read_examples(task, source, root=root, limit=limit)


def _show(result: Result) -> None:
    table = Table(title=f"{result.title} ({result.source})")
    for number, column in enumerate(result.columns):
        table.add_column(str(column), justify="left" if number == 0 else "right")
    for row in result.rows:
        table.add_row(*map(str, row))
    out.print(table)
    for note in result.notes:
        out.print(f"[dim]{note}[/]", highlight=False)
