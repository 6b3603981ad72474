"""Options of commands that train: a task or a prompt, its data, and settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from spectr.cli.console import say

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
