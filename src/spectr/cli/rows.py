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
    """Rows of data, with a task or with a prompt and its answers."""

    task: Annotated[
        str | None,
        typer.Option(
            help="Use this shipped task or task file. For finished experts the default is the shipped task with the "
            "expert's name."
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(help="Read the training rows from this JSONL file, or from hub:<dataset>[:<config>]:<split>."),
    ] = None
    data_root: DataRootOption = None
    prompt: Annotated[
        str | None, typer.Option(help='Set the prompt template, with the fields of a row: "Topic of: {title}".')
    ] = None
    answer: Annotated[str | None, typer.Option(help="Set the answer's template, for free text.")] = None
    choices: Annotated[
        str | None,
        typer.Option(help='List the answers in the order of the numbers in a row\'s field "label": "World,Sports".'),
    ] = None

    def source(self, **more: Any) -> Source:
        """The options, as the library takes them."""
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
    """The step from which a run in one of these folders resumes."""
    from spectr.training import checkpoint_step

    step = max(map(checkpoint_step, folders))
    return f"stopped after step {step}; the same command resumes there" if step else "nothing was saved yet"
