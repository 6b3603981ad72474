"""A task file: one small YAML that says how a row becomes a prompt with its possible answers."""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spectr.errors import DataError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row, rendered: ``answer`` is ``choices[label]`` where the task has choices."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    label: int | None = None


class Task(BaseModel):
    """How rows become examples.

    Attributes:
        name: Identifier, also the default name of the expert.
        version: Rises whenever the prompt or the answers change.
        expert: Name of the expert that belongs to the task.
        prompt: Template over the row's fields, as in ``{title}``; constant text first, so that it can be shared.
        choices: Answers by label number, or the name of the row's field that lists them. ``None`` for free text.
        answer: Template of a free-text answer; only where there are no choices.
        length_normalised: Whether a choice is scored by its mean instead of its total log-likelihood.
        label: The row's field with the label number.
        train: Training rows: a path below the data folder, or ``hub:<dataset>[:<config>]:<split>``.
        test: Test rows, likewise.
        sample: One made-up row with its label, for demonstrations without data.
        paraphrases: The prompt in other words, likewise templates; no expert is to be trained on them.
        note: What a reader of its figures should know.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: int = Field(ge=1)
    prompt: str
    choices: tuple[str, ...] | str | None = None
    answer: str | None = None
    expert: str | None = None
    length_normalised: bool = False
    label: str = "label"
    train: str | None = None
    test: str | None = None
    sample: dict[str, Any] | None = None
    paraphrases: tuple[str, ...] = ()
    note: str = ""

    @model_validator(mode="after")
    def _one_kind_of_answer(self) -> Task:
        if (self.choices is None) == (self.answer is None):
            raise ValueError("a task has either 'choices' or a free-text 'answer' template, and one of them")
        for template in (self.prompt, self.answer, *self.paraphrases):
            if template is not None and not _is_template(template):
                raise ValueError(
                    f"the template {template!r} has wrong braces: fields are {{name}}, a brace itself {{{{"
                )
        if isinstance(self.choices, tuple) and (len(self.choices) < 2 or len(set(self.choices)) < len(self.choices)):
            raise ValueError("'choices' needs at least two, all different")
        if isinstance(self.choices, tuple) and not all(choice.strip() for choice in self.choices):
            raise ValueError("'choices' holds an empty answer")
        return self

    @staticmethod
    def load(path: str | Path) -> Task:
        """Read a task file.

        Raises:
            DataError: The file is missing or not YAML, or fields are missing, unknown or wrong (all named at once).
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"no task file at {path}", do="give the path of a YAML task file, or a shipped task's name")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{path} holds no fields", expected="YAML with name, version, prompt and choices")
        return _validated(content, f"task file {path}")

    @staticmethod
    def of(**fields: Any) -> Task:
        """A task from its fields.

        Raises:
            DataError: Fields are missing, unknown or wrong; all named at once.
        """
        return _validated(fields, "this task")

    @staticmethod
    def shipped(name: str) -> Task:
        """One of the tasks that come with the package, by name."""
        tasks = shipped_tasks()
        if name not in tasks:
            raise DataError(f"unknown task '{name}'", do=did_you_mean(name, tasks))
        return tasks[name]

    def reworded(self, number: int) -> Task:
        """The task with a paraphrase, counted from 0, for its prompt."""
        return self.model_copy(update={"prompt": self.paraphrases[number], "paraphrases": ()})

    def example(self, row: dict[str, Any]) -> Example:
        """Render a row.

        Raises:
            DataError: A field that the templates name is absent, or the label is not the number of a choice.
        """
        prompt = _fill(self.prompt, row, self.name)
        if self.answer is not None:
            return Example(prompt=prompt, answer=_fill(self.answer, row, self.name))
        choices: Any = _field(self.choices, row, self.name) if isinstance(self.choices, str) else self.choices
        if not isinstance(choices, (list, tuple)) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
            raise DataError(
                f"task '{self.name}': the field '{self.choices}'{_of(row)} is {choices!r}",
                expected="a list of two or more texts",
            )
        label = _field(self.label, row, self.name)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
            raise DataError(
                f"task '{self.name}': label {label!r}{_of(row)}",
                expected=f"a whole number from 0 to {len(choices) - 1}",
                do=f"correct the field '{self.label}' of the data",
            )
        return Example(prompt=prompt, answer=choices[label], choices=tuple(choices), label=label)


def _validated(fields: dict[str, Any], what: str) -> Task:
    try:
        return Task.model_validate(fields)
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        faults = "; ".join(f"{place}: {message}" if place else message for place, message in found)
        raise DataError(f"{what}: {faults}", do="see the shipped tasks for the form") from error


@cache
def shipped_tasks() -> dict[str, Task]:
    """The tasks that come with the package, by name, in alphabetical order."""
    folder = resources.files("spectr.tasks") / "shipped"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    tasks = [Task.model_validate(yaml.safe_load(f.read_text(encoding="utf-8"))) for f in files]
    return {task.name: task for task in tasks}


def _field(name: str | None, row: dict[str, Any], task: str) -> Any:
    if name not in row:
        raise DataError(
            f"task '{task}' needs the field '{name}', which {_of(row).removeprefix(' of ') or 'the row'} does not have",
            do=f"use one of the row's fields: {', '.join(sorted(row))}"
            + ("; 'label' is the number of the right choice, from 0" if name == "label" else ""),
        )
    return row[name]


def _of(row: dict[str, Any]) -> str:
    return f" of row {row['id']}" if "id" in row else ""


def _is_template(template: str) -> bool:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError:
        return False
    return all(name.isidentifier() for name in names)


def _fill(template: str, row: dict[str, Any], task: str) -> str:
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    return template.format(**{name: _field(name, row, task) for name in names})
