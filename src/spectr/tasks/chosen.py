"""The task that a command names, where its data are, and what a record says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from spectr.errors import DataError
from spectr.hashing import file_sha256
from spectr.tasks.rows import data_source
from spectr.tasks.task import Task


def chosen_task(task: str | None, prompt: str | None, answer: str | None, choices: str | None, name: str) -> Task:
    """A shipped task, one of a file, or a prompt with its answers.

    Args:
        task: A shipped task's name, or a file.
        prompt: Template over the fields of a row.
        answer: Template of the answer, for free text.
        choices: Answers with commas between them.
        name: Of a task that is made of a prompt.

    Raises:
        DataError: Nothing, or too much, says how a row becomes a prompt and an answer.
    """
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
    return data_source(task, part, root) if task.hub or getattr(task, part) else None


def origin_of(task: Task, train: str, test: str | None, root: str | None) -> dict[str, Any]:
    """Task, paths and hashes of the data, for the record."""
    origin: dict[str, Any] = {"task": task.title}
    for what, source in (("train", train), ("test", test)):
        if source:
            origin[what] = source
            path = Path(root or ".") / source
            if path.is_file():
                origin[f"{what} sha256"] = file_sha256(path)
    return origin
