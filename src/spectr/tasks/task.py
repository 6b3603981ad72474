"""A task file: one small YAML that says how a row becomes a prompt with its possible answers."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from spectr.errors import DataError, did_you_mean
from spectr.tasks import template

CHOICE_METRICS = ("accuracy",)
TEXT_METRICS = ("exact_match", "rouge1", "rouge2", "rougeL")
METRICS = (*CHOICE_METRICS, *TEXT_METRICS)


def faults(fields: Mapping[str, Any]) -> list[str]:
    """What is wrong between fields. Missing fields and fields of the wrong type are skipped."""
    return [*_of_templates(fields), *_of_answers(fields), *_of_letters(fields)]


def _of_templates(fields: Mapping[str, Any]) -> Iterator[str]:
    more = fields.get("paraphrases")
    listed = [fields.get("prompt"), fields.get("answer"), fields.get("letters")]
    for text in (*listed, *(more if isinstance(more, (list, tuple)) else ())):
        wrong = template.fault(text) if isinstance(text, str) else None
        if wrong:
            yield wrong


def _of_answers(fields: Mapping[str, Any]) -> Iterator[str]:
    choices, answer, metric = fields.get("choices"), fields.get("answer"), fields.get("metric")
    if isinstance(metric, str) and metric not in METRICS:
        yield f"unknown metric '{metric}'; {did_you_mean(metric, METRICS)}"
    if (choices is None) == (answer is None):
        yield "a task needs either 'choices' or a free-text 'answer' template"
    elif answer is None and metric in TEXT_METRICS:
        yield f"metric '{metric}' is for free text, but this task has choices: use {', '.join(CHOICE_METRICS)}"
    elif choices is None and metric in CHOICE_METRICS:
        yield f"metric '{metric}' is for choices, but this task's answer is free text: use {', '.join(TEXT_METRICS)}"
    if isinstance(choices, (list, tuple)) and all(isinstance(choice, str) for choice in choices):
        if len(choices) < 2 or len(set(choices)) < len(choices):
            yield "'choices' needs at least two different answers"
        if not all(choice.strip() for choice in choices):
            yield "'choices' holds an empty answer"


def _of_letters(fields: Mapping[str, Any]) -> Iterator[str]:
    letters = fields.get("letters")
    if letters is None and fields.get("form") == "letters":
        yield "'form' is letters, but there is no template 'letters'"
    if not isinstance(letters, str):
        return
    if fields.get("choices") is None:
        yield "'letters' lists choices, but this task has none"
    if template.fault(letters) is None and "options" not in template.names(letters):
        yield "'letters' needs {options}, which the lettered choices replace"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row as prompt and answer. If the task has choices, ``answer`` is ``choices[label]``."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    label: int | None = None


class HubData(BaseModel):
    """Where a task's rows are on the Hub.

    Attributes:
        train: Training rows, ``hub:<dataset>[:<config>]:<split>``.
        test: Test rows in the same form, from a split whose labels are public.
        fields: Templates over the Hub's fields, for fields that the task's templates need and the Hub's rows lack.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str | None = None
    test: str | None = None
    fields: dict[str, str] = {}

    @field_validator("train", "test")
    @classmethod
    def _is_a_hub_source(cls, source: str | None) -> str | None:
        if source is not None and not (source.startswith("hub:") and source.count(":") in (2, 3)):
            raise ValueError(f"'{source}' is not of the form hub:<dataset>[:<config>]:<split>")
        return source

    @field_validator("fields")
    @classmethod
    def _are_templates(cls, fields: dict[str, str]) -> dict[str, str]:
        wrong = [fault for text in fields.values() if (fault := template.fault(text))]
        if wrong:
            raise ValueError("; ".join(wrong))
        return fields


class Task(BaseModel):
    """How rows become examples.

    Attributes:
        name: Identifier, and the default name of the expert.
        version: Increases whenever the prompt or the answers change.
        expert: Name of the expert that belongs to the task.
        prompt: Template over the row's fields, as in ``{title}``. Put constant text first, so that prompts share it.
        choices: Answers in the order of the label numbers, or the row's field that lists them. ``None`` for free text.
        answer: Template of a free-text answer, for tasks without choices.
        metric: How answers are scored. For choices: accuracy. For free text: exact_match (the default), rouge1, rouge2
            or rougeL.
        max_new_tokens: Maximum length of a free-text answer.
        length_normalised: Score a choice by its mean log-likelihood, not by the total.
        letters: The prompt with lettered options in the place of ``{options}``. The answer is then a letter.
        form: Whether the choices are shown as words or as letters. See :meth:`lettered`.
        label: The row's field that holds the label number.
        train: Training rows: a path below the data folder, or ``hub:<dataset>[:<config>]:<split>``.
        test: Test rows, in the same form.
        hub: The same data on the Hub.
        sample: One made-up row with its label, for demonstrations without data.
        paraphrases: Templates of the prompt in other words. Do not train an expert on them.
        note: What a reader of the task's results should know.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: int = Field(ge=1)
    prompt: str
    choices: tuple[str, ...] | str | None = None
    answer: str | None = None
    metric: str = "accuracy"
    max_new_tokens: int = Field(64, ge=1)
    expert: str | None = None
    length_normalised: bool = False
    letters: str | None = None
    form: Literal["words", "letters"] = "words"
    label: str = "label"
    train: str | None = None
    test: str | None = None
    hub: HubData | None = None
    sample: dict[str, Any] | None = None
    paraphrases: tuple[str, ...] = ()
    note: str = ""

    @model_validator(mode="before")
    @classmethod
    def _metric_of_its_answers(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("metric") is not None:
            return fields
        return {**fields, "metric": "accuracy" if fields.get("answer") is None else "exact_match"}

    @model_validator(mode="after")
    def _fields_go_together(self) -> Task:
        found = faults(dict(self))
        if found:
            raise ValueError("; ".join(found))
        return self

    @staticmethod
    def load(path: str | Path) -> Task:
        """Read a task file.

        Raises:
            DataError: The file is missing or not YAML, or fields are missing, unknown or wrong. All problems are
                listed.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"no task file at {path}", do="use the path of a YAML task file, or a shipped task's name")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{path} holds no fields", expected="YAML with name, version, prompt and choices")
        return _validated(content, f"task file {path}")

    @staticmethod
    def of(**fields: Any) -> Task:
        """Make a task from its fields.

        Raises:
            DataError: Fields are missing, unknown or wrong. All problems are listed.
        """
        return _validated(fields, "this task")

    @staticmethod
    def shipped(name: str) -> Task:
        """Get a task that comes with the package by its name."""
        tasks = {**heldout_tasks(), **shipped_tasks()}
        if name not in tasks:
            raise DataError(f"unknown task '{name}'", do=did_you_mean(name, tasks))
        return tasks[name]

    @property
    def title(self) -> str:
        """Name, version and form, for origins: "agnews v1" or "agnews v1, lettered"."""
        return f"{self.name} v{self.version}" + (", lettered" if self.form == "letters" else "")

    def reworded(self, number: int) -> Task:
        """The task with one of its paraphrases as prompt; the index counts from 0."""
        return self.model_copy(update={"prompt": self.paraphrases[number], "paraphrases": ()})

    def lettered(self) -> Task:
        """The task in its other form: lettered options, and a letter as answer. This form has no paraphrases.

        Raises:
            DataError: The task has no template ``letters``.
        """
        if self.letters is None:
            raise DataError(
                f"task '{self.name}' has no form with lettered options",
                expected="a template 'letters' with {options} in its file",
                do="add it, or remove --letters",
            )
        return self.model_copy(update={"form": "letters", "paraphrases": (), "length_normalised": False})

    def example(self, row: Mapping[str, Any]) -> Example:
        """Render a row.

        Raises:
            DataError: A field that a template names is missing, or the label is not the number of a choice.
        """
        if self.answer is not None:
            filled = (template.fill(text, row, self.name) for text in (self.prompt, self.answer))
            return Example(prompt=next(filled), answer=next(filled))
        choices, prompt = self._choices(row), self.prompt
        if self.form == "letters":
            assert self.letters is not None
            choices, row, prompt = *_as_letters(choices, row, self.name), self.letters
        text = template.fill(prompt, row, self.name)
        label = self._label(row, len(choices))
        return Example(prompt=text, answer=choices[label], choices=choices, label=label)

    def _choices(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        choices: Any = self.choices
        if isinstance(choices, str):
            choices = template.field(choices, row, self.name)
        if not isinstance(choices, (list, tuple)) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
            raise DataError(
                f"task '{self.name}': the field '{self.choices}'{template.of(row)} is {choices!r}",
                expected="a list of at least two texts",
                do="correct this field in the data, or use another field for 'choices'",
            )
        return tuple(choices)

    def _label(self, row: Mapping[str, Any], count: int) -> int:
        label = template.field(self.label, row, self.name)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < count:
            raise DataError(
                f"task '{self.name}': label {label!r}{template.of(row)}",
                expected=f"a whole number from 0 to {count - 1}",
                do=f"correct the field '{self.label}' in the data",
            )
        return label


def _as_letters(choices: tuple[str, ...], row: Mapping[str, Any], task: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The letters, and the row with its lettered options."""
    if len(choices) > len(string.ascii_uppercase):
        raise DataError(
            f"task '{task}': {len(choices)} choices{template.of(row)}",
            expected=f"at most {len(string.ascii_uppercase)}, the number of letters",
            do="remove --letters",
        )
    letters = tuple(string.ascii_uppercase[: len(choices)])
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return letters, {**row, "options": options}


def _validated(fields: dict[str, Any], what: str) -> Task:
    try:
        return Task.model_validate(fields)
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        lines = [f"{place}: {message}" if place else message for place, message in found]
        if all(place for place, _ in found):  # if a field is wrong, pydantic skips the checks between fields
            lines += faults(fields)
        raise DataError(f"{what}: {'; '.join(lines)}", do="see the shipped tasks for examples") from error


@cache
def shipped_tasks() -> dict[str, Task]:
    """The package's tasks that have an expert in the package, by name in alphabetical order."""
    return _tasks_in("shipped")


@cache
def heldout_tasks() -> dict[str, Task]:
    """The package's tasks that none of its experts was trained on, by name in alphabetical order."""
    return _tasks_in("heldout")


def _tasks_in(part: str) -> dict[str, Task]:
    folder = resources.files("spectr.tasks") / part
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    tasks = [Task.model_validate(yaml.safe_load(f.read_text(encoding="utf-8"))) for f in files]
    return {task.name: task for task in tasks}
