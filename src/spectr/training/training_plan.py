"""What to train, read and checked before a model is loaded."""

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
from spectr.tasks.own_rows import read_own_rows
from spectr.tasks.rows import Source
from spectr.training.training_settings import GateSettings, TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectr.training.adapter import Report
    from spectr.training.fit import Progress


TEST_ROWS = 200  # minutes on a CPU, with a standard error of at most 3.5 points


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One expert to train.

    Attributes:
        name: The expert's name.
        out: Its folder.
        task: What it learns.
        train: Training examples.
        validation: Examples that select the epoch.
        test: Examples to measure on, before and after training.
        test_rows: Their numbers among the test rows, starting at 1; ``None`` for all.
        settings: Settings of the run.
        data: Origin of the examples, for the card.
        remarks: What the user should know before the run.
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
            DataError: See :func:`spectr.training.adapter.settle`.
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
    """Read and check everything that a training run needs.

    Args:
        out: Folder for the expert.
        source: Task and data.
        name: The expert's name; by default the task's or the folder's.
        validation: Number of rows to hold out, from the start of the data.
        test_limit: Maximum number of test rows, drawn at random with a fixed seed; ``None`` for all.
        settings: Options of :class:`TrainingSettings`.

    Raises:
        DataError: Something is missing, cannot be read or is out of range, or ``out`` cannot be written.
        MissingExtraError: PEFT is not installed.
    """
    if out is None:
        raise DataError("no folder was named for the expert", do="name a folder: --out runs/mine")
    task = source.read_task(name or out.name)
    train, test = source.rows(task, "train"), source.rows(task, "test")
    if train is None:
        raise DataError("no training data was named", do="use --data, or a task with training data")
    examples = settings.get("examples")
    rows = read_examples(task, train, root=source.root, limit=None if examples is None else validation + examples)
    if validation >= len(rows):
        raise DataError(
            f"--validation {validation} holds out all {len(rows)} rows",
            do="hold out fewer rows, or add data",
        )
    test_examples = read_examples(task, test, root=source.root) if test else []
    drawn = _drawn(len(test_examples), test_limit)
    if find_spec("peft") is None:
        raise MissingExtraError("training", "train")
    made = TrainingSettings(**settings)
    from spectr.training.training_run import check_folder

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
    remarks = ["the test rows are training rows, so that the accuracy does not hold for new rows"] * same
    if drawn is not None:
        which = some_of([str(row) for row in drawn], 5)
        remarks.append(
            f"measuring on {len(drawn)} of {rows} test rows, drawn at random: {which}; for all of them: --all-test-rows"
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
        base_model: Name of the base model in the adapter's configuration.
        progress: Called with (phase, done, total, remark).
    """
    from spectr.training.training_run import train_expert

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
    """Experts to train gates for.

    Attributes:
        library: Folder of the experts.
        experts: By name, the examples and their origin. The origin has the numbers of the first and the last row, if
            these are known to have trained the expert.
        settings: Settings of each run.
    """

    library: Path
    experts: Mapping[str, tuple[Expert, list[Example], dict[str, Any]]]
    settings: GateSettings

    @property
    def remarks(self) -> list[str]:
        """What a user should know before the runs: which rows are read, and how often."""
        return [
            f"gates of {name}: {self.settings.passes(len(rows)):.1f} epochs of {len(rows)} rows, {_which(origin)}"
            for name, (_, rows, origin) in self.experts.items()
        ]

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
    """Read and check everything that training of gates needs. The rows are those that trained the expert, where its
    record says which.

    Args:
        library: Folder of the experts.
        names: Experts to train gates for; if empty, all.
        source: Task and data of a single expert. By default each expert has the shipped task of its name.
        fresh: Whether to train gates again for experts that have some.
        limit: Maximum number of examples per expert.
        settings: Options of :class:`GateSettings`.

    Raises:
        DataError: The library is missing, one source is for several experts, data is unreadable, or a setting is wrong.
        LibraryError: There is no such library or expert.
    """
    if library is None:
        raise DataError("no library was named for the gates", do="name its folder: --library experts")
    experts = open_library(library)
    experts.check(*names)
    chosen = [name for name in names or experts if fresh or not has_gates(experts[name])]
    made = GateSettings(**settings)
    found = read_own_rows(experts, chosen, source, limit=limit)
    return GatePlan(
        library=library, experts={name: (experts[name], *rows) for name, rows in found.items()}, settings=made
    )


def _which(origin: Mapping[str, Any]) -> str:
    if "rows" not in origin:
        return "perhaps not only those that trained it: it has no record of them for this data"
    first, last = origin["rows"]
    return f"{first} to {last}, which trained it"


def run_gate_plan(
    plan: GatePlan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress = lambda *_: None,
) -> None:
    """Train and store each expert's gates in turn; see :func:`spectr.training.train_gates`.

    Args:
        plan: What to train.
        model: The base model.
        tokenizer: Its tokenizer.
        progress: Called with (phase, done, total, remark).
    """
    from spectr.training.gate_training import forget, keep_gates, train_gates

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
