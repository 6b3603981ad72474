"""What commands that train are given: a task or a prompt, its data, and settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spectr.cli.console import say
from spectr.errors import DataError

if TYPE_CHECKING:
    from spectr.tasks import Task

_PANEL = "Settings (the paper's are the defaults)"

PromptOption = Annotated[str | None, typer.Option(help='Template over the fields of a row: "Topic of: {title}"')]
AnswerOption = Annotated[str | None, typer.Option(help="Template of the answer, for free text.")]
ChoicesOption = Annotated[
    str | None,
    typer.Option(help='Answers, in the order of the numbers in the field "label" of a row: "World,Sports"'),
]


def rows_option(what: str) -> Any:
    """An option that names rows of data, with what they are for."""
    return typer.Option(help=f"{what}: a JSONL file, or hub:<dataset>[:<config>]:<split>.")


def setting(text: str) -> Any:
    """An option of a run's settings, with its help."""
    return typer.Option(help=text, rich_help_panel=_PANEL)


@contextmanager
def told_where_it_stopped(folder: Path) -> Iterator[None]:
    """Say at Ctrl-C from which step on a run of this folder can go on."""
    try:
        yield
    except KeyboardInterrupt:
        from spectr.training import checkpoint_step

        step = checkpoint_step(folder)
        say(f"stopped after step {step}; the same command goes on from there" if step else "nothing was saved yet")
        raise


def chosen_task(task: str | None, prompt: str | None, answer: str | None, choices: str | None, name: str) -> Task:
    """The task that a command was given: a shipped one, a file, or a prompt with its answers."""
    from spectr.tasks import Task

    if task is None and prompt is None:
        raise DataError(
            "nothing says how a row becomes a prompt",
            do='give --task agnews (or a task file), or --prompt "..." with --answer "..." or --choices "a,b"',
        )
    if task is not None:
        if prompt or answer or choices:
            raise DataError("--task comes with its own templates", do="leave out --prompt, --answer and --choices")
        return Task.load(task) if task.endswith((".yaml", ".yml")) else Task.shipped(task)
    if (answer is None) == (choices is None):
        raise DataError("one kind of answer is needed", do='give --answer "{field}" or --choices "no,yes", not both')
    listed = tuple(choice.strip() for choice in choices.split(",")) if choices else None
    assert prompt is not None
    return Task.of(name=name, version=1, prompt=prompt, answer=answer, choices=listed)


def source_of(task: Task, part: Literal["train", "test"], root: str | None) -> str | None:
    """Where a task's data are; ``None`` where it names none."""
    from spectr.tasks import data_source

    return data_source(task, part, root) if task.hub or getattr(task, part) else None


def origin_of(task: Task, train: str, test: str | None, root: str | None) -> dict[str, Any]:
    """Task, paths and hashes of the data, for the record."""
    from spectr.hashing import file_sha256

    origin: dict[str, Any] = {"task": task.title}
    for what, source in (("train", train), ("test", test)):
        if source:
            origin[what] = source
            path = Path(root or ".") / source
            if path.is_file():
                origin[f"{what} sha256"] = file_sha256(path)
    return origin
