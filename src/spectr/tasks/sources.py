"""Rows of data as commands name them: of a task, or of a prompt with its answers; for one expert, or for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spectr.errors import DataError, SpectrError, collecting, raise_together
from spectr.tasks.chosen import chosen_task, origin_of, source_of
from spectr.tasks.rows import read_examples
from spectr.tasks.task import Example, Task, shipped_tasks


@dataclass(frozen=True, kw_only=True)
class Source:
    """A task and its data, as a command names them; see :func:`spectr.tasks.chosen.chosen_task`.

    Attributes:
        task: A shipped task's name, or a file.
        prompt: Template over the fields of a row.
        answer: Template of the answer.
        choices: Answers with commas between them.
        train: Training rows, where they are not the task's own.
        test: Test rows, likewise.
        root: Folder that relative paths start from, or "hub".
        letters: List the options as letters.
    """

    task: str | None = None
    prompt: str | None = None
    answer: str | None = None
    choices: str | None = None
    train: str | None = None
    test: str | None = None
    root: str | None = None
    letters: bool = False

    @property
    def own(self) -> bool:
        """Whether it names a task or data at all."""
        return any((self.task, self.train, self.prompt, self.answer, self.choices))

    def read_task(self, name: str, task: str | None = None) -> Task:
        """The task, by default that of the name ``task``."""
        about = chosen_task(self.task or task, self.prompt, self.answer, self.choices, name)
        return about.lettered() if self.letters else about


def read_expert_rows(
    names: Sequence[str], source: Source, *, limit: int | None = None
) -> dict[str, tuple[list[Example], dict[str, Any]]]:
    """By expert rows of the data that trained it, and their origin.

    Args:
        names: The experts.
        source: Task and data of the one expert; without any, each expert's are those of the shipped task of its name.
        limit: Rows of each at most.

    Raises:
        DataError: One source for several experts, or data that cannot be read, for all experts at once.
    """
    if source.own and len(names) > 1:
        raise DataError(
            f"one task's data for {len(names)} experts ({', '.join(names)})", do="name the expert that it belongs to"
        )
    found: dict[str, tuple[list[Example], dict[str, Any]]] = {}
    problems: list[SpectrError] = []
    for name in names:
        with collecting(problems):
            found[name] = _expert_rows(name, source, limit)
    raise_together("the data of these experts", problems, DataError)
    return found


def _expert_rows(name: str, source: Source, limit: int | None) -> tuple[list[Example], dict[str, Any]]:
    if not source.own and name not in shipped_tasks():
        raise DataError(
            f"no shipped task has the name of the expert '{name}'",
            do="name its data: --task FILE, or --data ROWS with --prompt and --choices (or --answer)",
        )
    about = source.read_task(name, None if source.prompt else name)
    rows = source.train or source_of(about, "train", source.root)
    if rows is None:
        raise DataError(f"no training data was named for '{name}'", do="give --data, or a task that names its own")
    return read_examples(about, rows, root=source.root, limit=limit), origin_of(about, rows, None, source.root)
