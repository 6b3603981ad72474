"""Options of commands that train: a task or a prompt, its data, and settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectr.cli.options import DataRootOption

if TYPE_CHECKING:
    from spectr.tasks.sources import Source

_PANEL = "Settings (the paper's are the defaults)"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of data with a task, or with a prompt and its answers."""

    task: Annotated[
        str | None,
        typer.Option(
            help="Name a shipped task or a task file. For finished experts the default is the shipped task of the "
            "expert's name."
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(help="Take the training rows of a JSONL file, or of hub:<dataset>[:<config>]:<split>."),
    ] = None
    data_root: DataRootOption = None
    prompt: Annotated[
        str | None, typer.Option(help='Set the template over the fields of a row: "Topic of: {title}".')
    ] = None
    answer: Annotated[str | None, typer.Option(help="Set the template of the answer, for free text.")] = None
    choices: Annotated[
        str | None,
        typer.Option(help='List the answers, in the order of the numbers in a row\'s field "label": "World,Sports".'),
    ] = None

    def source(self, **more: Any) -> Source:
        """What was given, as the library takes it."""
        from spectr.tasks.sources import Source

        return Source(
            task=self.task,
            prompt=self.prompt,
            answer=self.answer,
            choices=self.choices,
            train=self.data,
            root=self.data_root,
            **more,
        )


def setting(text: str) -> Any:
    """An option of a run's settings, with its help."""
    return typer.Option(help=text, rich_help_panel=_PANEL)


def last_step(*folders: Path) -> str:
    """From which step on a run of one of these folders can go on."""
    from spectr.training import checkpoint_step

    step = max(map(checkpoint_step, folders))
    return f"stopped after step {step}; the same command goes on from there" if step else "nothing was saved yet"
