"""What is to be trained, read and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from spectr.adapters import Expert, has_gates
from spectr.errors import DataError, MissingExtraError, some_of
from spectr.shipped import open_library
from spectr.tasks import Example, Task, read_examples
from spectr.tasks.sources import Source, read_expert_rows
from spectr.training.settings import GateSettings, TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectr.training.fit import Progress
    from spectr.training.publish import Report


TEST_ROWS = 200  # minutes on a CPU, with a standard error of at most 3.5 points


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
        test_rows: Their numbers among the test rows, from 1; ``None`` for all.
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
    test_rows: Sequence[int] | None = None

    def check_base(self, config: Any, *_: Any) -> None:
        """Check the configuration of the base model, before its weights are read.

        Raises:
            DataError: As of :func:`spectr.training.adapter.settle`.
        """
        from transformers import AutoModelForCausalLM

        from spectr.training.adapter import settle

        settle(lambda: AutoModelForCausalLM.from_config(config), self.settings)


def read_plan(
    out: Path | None,
    source: Source,
    *,
    name: str | None = None,
    validation: int = 0,
    test_limit: int | None = TEST_ROWS,
    settings: Mapping[str, Any],
) -> Plan:
    """Read and check all of a training run.

    Args:
        out: Folder for the expert.
        source: Its task and data.
        name: The expert's; by default the task's or the folder's.
        validation: Rows that are held out, the first of the data.
        test_limit: Test rows at most, drawn at random, always the same ones; ``None`` for all.
        settings: Of :class:`TrainingSettings`.

    Raises:
        DataError: Something is missing, cannot be read or is out of range, or ``out`` cannot be written.
        MissingExtraError: PEFT is not installed.
    """
    if out is None:
        raise DataError("no folder was named for the expert", do="give a folder: --out runs/mine")
    task = source.read_task(name or out.name)
    train, test = source.rows(task, "train"), source.rows(task, "test")
    if train is None:
        raise DataError("no training data was named", do="give --data, or a task that names its own")
    examples = settings.get("examples")
    rows = read_examples(task, train, root=source.root, limit=None if examples is None else validation + examples)
    if validation >= len(rows):
        raise DataError(
            f"--validation {validation} holds out all of the {len(rows)} rows that there are",
            do="hold out fewer, or give more data",
        )
    test_examples = read_examples(task, test, root=source.root) if test else []
    drawn = _drawn(len(test_examples), test_limit)
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
        test=test_examples if drawn is None else [test_examples[row - 1] for row in drawn],
        test_rows=drawn,
        settings=made,
        data=source.origin(task, train, test),
        remarks=_remarks(test == train, drawn, len(test_examples)),
    )


def _drawn(rows: int, limit: int | None) -> list[int] | None:
    """Numbers of the test rows to measure on, ascending from 1; ``None`` for all."""
    return None if limit is None or rows <= limit else sorted(Random(0).sample(range(1, rows + 1), limit))


def _remarks(same: bool, drawn: Sequence[int] | None, rows: int) -> list[str]:
    remarks = ["the test rows are training rows: the accuracy says nothing about new ones"] * same
    if drawn is not None:
        which = some_of([str(row) for row in drawn], 5)
        remarks.append(
            f"measuring on {len(drawn)} of {rows} test rows, drawn at random: {which}; --all-test-rows measures on all"
        )
    return remarks


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
        test_rows=plan.test_rows,
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


@dataclass(frozen=True, kw_only=True)
class GatePlan:
    """Experts whose gates are to be trained.

    Attributes:
        library: Folder of the experts.
        experts: By name each with its examples and their origin.
        settings: Of each run.
    """

    library: Path
    experts: Mapping[str, tuple[Expert, list[Example], dict[str, Any]]]
    settings: GateSettings

    @property
    def work(self) -> list[Path]:
        """The folder of each expert's checkpoint."""
        return [self.library / f".gates-{name}" for name in self.experts]


def read_gate_plan(
    library: Path | None,
    names: Sequence[str],
    source: Source,
    *,
    fresh: bool = False,
    limit: int | None = None,
    settings: Mapping[str, Any],
) -> GatePlan:
    """Read and check all of a run that trains gates.

    Args:
        library: Folder of the experts.
        names: Some of them; all if empty.
        source: Task and data of the one expert; without any, each expert's are those of the shipped task of its name.
        fresh: Whether those are trained too that have gates.
        limit: Examples of each at most.
        settings: Of :class:`GateSettings`.

    Raises:
        DataError: No library, one source for several experts, data that cannot be read, or a setting out of range.
        LibraryError: There is no such library or expert.
    """
    if library is None:
        raise DataError("no library was named for the gates", do="give its folder: --library experts")
    experts = open_library(library)
    experts.check(*names)
    chosen = [name for name in names or experts if fresh or not has_gates(experts[name])]
    made = GateSettings(**settings)
    found = read_expert_rows(chosen, source, limit=limit)
    return GatePlan(
        library=library, experts={name: (experts[name], *rows) for name, rows in found.items()}, settings=made
    )


def run_gate_plan(
    plan: GatePlan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = lambda *_: None,
) -> None:
    """Train and keep each expert's gates in turn; see :func:`spectr.training.train_gates`.

    Args:
        plan: What to train.
        model: The base model.
        tokenizer: Its tokenizer.
        progress: Receives (phase, done, total, remark).
    """
    from spectr.training.gates import forget, keep_gates, train_gates

    for work, (name, (expert, rows, origin)) in zip(plan.work, plan.experts.items(), strict=True):
        vectors, facts = train_gates(
            model,
            tokenizer,
            expert,
            train=rows,
            settings=plan.settings,
            work=work,
            data=origin,
            progress=lambda phase, *step, name=name: progress(f"{phase} gates of {name}", *step),
        )
        keep_gates(plan.library, expert, vectors, facts)
        forget(work)
