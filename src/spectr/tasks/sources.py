"""Data that a command names: a task's rows, or rows for a prompt template, for one expert or for several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spectr.errors import DataError, map_together
from spectr.hashing import file_sha256
from spectr.tasks.rows import data_source, read_examples
from spectr.tasks.task import Example, Task, shipped_tasks


@dataclass(frozen=True, kw_only=True)
class Source:
    """A task and its data, as a command's options name them.

    Attributes:
        task: A shipped task's name, or a task file.
        prompt: Template over the fields of a row.
        answer: Template of the answer.
        choices: Answers, separated by commas.
        train: Training rows, to replace the task's own.
        test: Test rows, to replace the task's own.
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
        """Whether the options name a task or data."""
        return any((self.task, self.train, self.prompt, self.answer, self.choices))

    def read_task(self, name: str, task: str | None = None) -> Task:
        """The task: a shipped one, a task file, or a prompt template with its answers.

        Args:
            name: Name for a task that is made from a prompt template.
            task: Task to use if the options name none.

        Raises:
            DataError: The options say too little, or too much, about how a row becomes a prompt and an answer.
        """
        named = self.task or task
        about = self._named(named) if named else self._of_a_prompt(name)
        return about.lettered() if self.letters else about

    def _named(self, task: str) -> Task:
        if self.prompt or self.answer or self.choices:
            raise DataError("--task has its own templates", do="remove --prompt, --answer and --choices")
        return Task.load(task) if task.endswith((".yaml", ".yml")) else Task.shipped(task)

    def _of_a_prompt(self, name: str) -> Task:
        if self.prompt is None:
            raise DataError(
                "there is no prompt template",
                do='use --task agnews (or a task file), or --prompt "..." with --answer "..." or --choices "a,b"',
            )
        if (self.answer is None) == (self.choices is None):
            raise DataError(
                "exactly one kind of answer is needed", do='use --answer "{field}" or --choices "no,yes", not both'
            )
        listed = tuple(choice.strip() for choice in self.choices.split(",")) if self.choices else None
        return Task.of(name=name, version=1, prompt=self.prompt, answer=self.answer, choices=listed)

    def rows(self, task: Task, part: Literal["train", "test"]) -> str | None:
        """Where the rows are: those of the options, or else the task's own. ``None`` if there are none."""
        own = task.hub or getattr(task, part)
        return getattr(self, part) or (data_source(task, part, self.root) if own else None)

    def origin(self, task: Task, train: str, test: str | None = None) -> dict[str, Any]:
        """The task, and the paths and hashes of its data, for records of origin."""
        origin: dict[str, Any] = {"task": task.title}
        for what, source in (("train", train), ("test", test)):
            if source:
                origin[what] = source
                path = Path(self.root or ".") / source
                if path.is_file():
                    origin[f"{what} sha256"] = file_sha256(path)
        return origin


def read_expert_rows(
    names: Sequence[str], source: Source, *, limit: int | None = None
) -> dict[str, tuple[list[Example], dict[str, Any]]]:
    """For each expert, rows of the data that trained it; and their origin.

    Args:
        names: The experts.
        source: Task and data of a single expert. Without it, each expert uses the shipped task of its name.
        limit: Maximum number of rows for each expert.

    Raises:
        DataError: One source was named for several experts, or data cannot be read (all experts are listed).
    """
    if source.own and len(names) > 1:
        raise DataError(
            f"one task's data cannot be for {len(names)} experts ({', '.join(names)})", do="name one expert"
        )
    title = "the data of these experts"
    found = map_together(title, lambda name: _expert_rows(name, source, limit), names, DataError)
    return dict(zip(names, found, strict=True))


def _expert_rows(name: str, source: Source, limit: int | None) -> tuple[list[Example], dict[str, Any]]:
    if not source.own and name not in shipped_tasks():
        raise DataError(
            f"no shipped task has the name of the expert '{name}'",
            do="pass its data: --task FILE, or --data ROWS with --prompt and --choices (or --answer)",
        )
    about = source.read_task(name, None if source.prompt else name)
    rows = source.rows(about, "train")
    if rows is None:
        raise DataError(f"no training data was named for '{name}'", do="use --data, or a task with training data")
    return read_examples(about, rows, root=source.root, limit=limit), source.origin(about, rows)
