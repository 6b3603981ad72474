"""What is to be trained, read and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectr.errors import DataError, MissingExtraError, SpectrError, raise_together
from spectr.tasks import Example, Task, read_examples, shipped_tasks
from spectr.tasks.chosen import chosen_task, origin_of, source_of
from spectr.training.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectr.training.fit import Progress
    from spectr.training.publish import Report


@dataclass(frozen=True, kw_only=True)
class Source:
    """A task and its data, as a command names them; see :func:`spectr.tasks.chosen.chosen_task`.

    Attributes:
        task: A shipped task's name, or a file.
        prompt: Template over the fields of a row.
        answer: Template of the answer.
        choices: Answers with commas between them.
        train: Rows to train on, where they are not the task's own.
        test: Rows to measure on, likewise.
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
        """Whether anything says what the data are."""
        return any((self.task, self.train, self.prompt, self.answer, self.choices))

    def read_task(self, name: str, task: str | None = None) -> Task:
        """The task, by default that of the name ``task``."""
        about = chosen_task(self.task or task, self.prompt, self.answer, self.choices, name)
        return about.lettered() if self.letters else about


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One expert to train.

    Attributes:
        name: The expert's.
        out: Its folder.
        task: What it learns.
        train: Training examples.
        validation: Examples that choose the epoch.
        test: Examples to measure on, before and after.
        settings: Of the run.
        data: Origin of the examples, for the card.
        remarks: What a user should know before the run.
    """

    name: str
    out: Path
    task: Task
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    settings: TrainingSettings
    data: dict[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def read_plan(
    out: Path | None,
    source: Source,
    *,
    name: str | None = None,
    validation: int = 0,
    test_limit: int | None = None,
    settings: Mapping[str, Any],
) -> Plan:
    """Read and check all of a training run.

    Args:
        out: Folder for the expert.
        source: Its task and data.
        name: The expert's; by default the task's or the folder's.
        validation: Rows that are held out, the first of the data.
        test_limit: Test rows at most.
        settings: Of :class:`TrainingSettings`.

    Raises:
        DataError: Something is missing, cannot be read or is out of range, or ``out`` cannot be written.
        MissingExtraError: PEFT is not installed.
    """
    if out is None:
        raise DataError("nothing says where the expert goes", do="give a folder: --out runs/mine")
    task = source.read_task(name or out.name)
    train = source.train or source_of(task, "train", source.root)
    test = source.test or source_of(task, "test", source.root)
    if train is None:
        raise DataError("no training data was named", do="give --data, or a task that names its own")
    examples = settings.get("examples")
    rows = read_examples(task, train, root=source.root, limit=None if examples is None else validation + examples)
    if validation >= len(rows):
        raise DataError(
            f"--validation {validation} holds out all of the {len(rows)} rows that there are",
            do="hold out fewer, or give more data",
        )
    test_examples = read_examples(task, test, root=source.root, limit=test_limit) if test else []
    if find_spec("peft") is None:
        raise MissingExtraError("training", "train")
    made = TrainingSettings(**settings)
    from spectr.training.run import check_folder

    check_folder(out)
    return Plan(
        name=name or task.name,
        out=out,
        task=task,
        train=rows[validation:],
        validation=rows[:validation],
        test=test_examples,
        settings=made,
        data=origin_of(task, train, test, source.root),
        remarks=["the test rows are training rows: the accuracy says nothing about new ones"] * (test == train),
    )


def run_plan(
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_model: str,
    progress: Progress = lambda *_: None,
) -> Report:
    """Train a plan's expert; see :func:`spectr.training.train_expert`.

    Args:
        plan: What to train.
        model: The base model.
        tokenizer: Its tokenizer.
        base_model: What the adapter's configuration names as its base.
        progress: Receives (phase, done, total, remark).
    """
    from spectr.training.run import train_expert

    return train_expert(
        model,
        tokenizer,
        name=plan.name,
        base_model=base_model,
        train=plan.train,
        test=plan.test,
        validation=plan.validation,
        settings=plan.settings,
        out=plan.out,
        data=plan.data,
        length_normalised=plan.task.length_normalised,
        metric=plan.task.metric,
        max_new_tokens=plan.task.max_new_tokens,
        note=plan.task.note,
        progress=progress,
    )


def read_gate_data(
    names: Sequence[str], source: Source, *, limit: int | None = None
) -> dict[str, tuple[list[Example], dict[str, Any]]]:
    """By expert the examples that its gates are trained on, and their origin.

    Args:
        names: The experts.
        source: Task and data of the one expert; without any, each expert's are those of the shipped task of its name.
        limit: Examples of each at most.

    Raises:
        DataError: One source for several experts, or data that cannot be read, for all experts at once.
    """
    if source.own and len(names) > 1:
        raise DataError(
            f"one task's data for {len(names)} experts ({', '.join(names)})", do="name the expert that it belongs to"
        )
    found, problems = {}, []
    for name in names:
        try:
            found[name] = _gate_data(name, source, limit)
        except SpectrError as error:
            problems.append(error)
    raise_together("the gates' training data", problems, DataError)
    return found


def _gate_data(name: str, source: Source, limit: int | None) -> tuple[list[Example], dict[str, Any]]:
    if not source.own and name not in shipped_tasks():
        raise DataError(
            f"no shipped task has the name of the expert '{name}'",
            do="name its data: --task FILE, or --data ROWS with --prompt and --choices (or --answer)",
        )
    about = source.read_task(name, None if source.own and source.prompt else name)
    rows = source.train or source_of(about, "train", source.root)
    if rows is None:
        raise DataError(f"no training data was named for '{name}'", do="give --data, or a task that names its own")
    return read_examples(about, rows, root=source.root, limit=limit), origin_of(about, rows, None, source.root)
