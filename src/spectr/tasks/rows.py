"""Rows of a dataset: JSONL files and datasets on the Hub, as tasks or a command's options name them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spectr.errors import DataError, MissingExtraError, SpectrError, collecting, map_together, raise_together
from spectr.hashing import file_sha256
from spectr.tasks import template
from spectr.tasks.task import Example, Task, shipped_tasks

HUB = "hub"
_SHOWN = 5  # problems of a file that an error lists in full


def read_rows(
    source: str, *, root: str | Path | None = None, limit: int | None = None, shuffle: bool = False
) -> list[dict[str, Any]]:
    """All rows of a source, or its first ``limit``.

    Args:
        source: Path of a JSONL file, or ``hub:<dataset>[:<config>]:<split>``.
        root: Folder that a relative path starts from. With "hub" there is none.
        limit: Maximum number of rows.
        shuffle: Take a Hub dataset's rows in a random but fixed order.

    Raises:
        DataError: The file is missing or empty, or some lines are not JSON objects (all are named). Or the Hub has no
            such data.
    """
    rows = list(_rows(source, root, limit, shuffle))
    raise_together(source, (row for row in rows if isinstance(row, DataError)), DataError, most=_SHOWN)
    return [row for row in rows if not isinstance(row, DataError)]


def read_examples(
    task: Task, source: str, *, root: str | Path | None = None, limit: int | None = None
) -> list[Example]:
    """Read a source's rows and turn them into a task's examples.

    Rows of the task's own Hub data come in a random but fixed order, because a dataset may be sorted by label.

    Raises:
        DataError: As for :func:`read_rows`. Or rows lack a field or have a label out of range; the error lists all
            problems of the file with their row numbers.
    """
    ours = task.hub is not None and source in (task.hub.train, task.hub.test)
    found: list[Example] = []
    problems: list[SpectrError] = []
    for number, row in enumerate(_rows(source, root, limit, shuffle=ours), start=1):
        if isinstance(row, DataError):
            problems.append(row)
            continue
        with collecting(problems, f"{source}, row {number}"):
            found.append(task.example(_from_hub(task, row, ours) if source.startswith("hub:") else row))
    raise_together(source, problems, DataError, most=_SHOWN)
    return found


def data_source(task: Task, part: Literal["train", "test"], root: str | Path | None = None) -> str | None:
    """Where a task's rows are: as its file says, or on the Hub if the data folder is "hub".

    Raises:
        DataError: The data folder is "hub", and the task names no Hub data.
    """
    own = getattr(task, part)
    if root != HUB or (own or "").startswith("hub:"):
        return own
    source = getattr(task.hub, part, None)
    if source is None:
        raise DataError(
            f"task '{task.name}' has no {part} data on the Hub",
            expected=f"'hub: {{{part}: \"hub:<dataset>:<split>\"}}' in its file",
            do="add it, or use a folder as --data-root",
        )
    return source


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: The file is missing, empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no text file at {path}", do="check the path")
    lines = [line.strip() for line in _lines(path) if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no text", expected="one text per line")
    return lines


def _rows(
    source: str, root: str | Path | None, limit: int | None, shuffle: bool
) -> Iterator[dict[str, Any] | DataError]:
    """The rows; an invalid row is replaced by what is wrong with it."""
    count = 0
    if source.startswith("hub:"):
        rows = iter(_hub_rows(source, limit, shuffle))
    else:
        rows = _jsonl_rows(Path("." if root in (None, HUB) else root) / source)  # pyright: ignore[reportArgumentType]
    for count, row in enumerate(rows, start=1):
        yield row
        if count == limit:
            return
    if count == 0:
        raise DataError(f"{source} holds no rows", expected="one JSON object per line", do="check the file")


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any] | DataError]:
    if not path.is_file():
        raise DataError(
            f"no data file at {path}",
            do="pass its folder with --data-root, or its full path; with --data-root hub, "
            "tasks read their datasets from the Hub",
        )
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield DataError(
                f"{path}, line {number}: {error}", expected="one JSON object per line", do="correct that line"
            )
            continue
        if isinstance(row, dict):
            yield row
        else:
            yield DataError(
                f"{path}, line {number}: a {type(row).__name__}", expected="a JSON object", do="correct that line"
            )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 and the like are legal in JSON
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start})", do="convert it to UTF-8"
        ) from error


def _hub_rows(source: str, limit: int | None, shuffle: bool) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading a Hub dataset", "train") from error
    parts = source.removeprefix("hub:").split(":")
    if len(parts) not in (2, 3):
        raise DataError(f"data source '{source}'", expected="hub:<dataset>:<split> or hub:<dataset>:<config>:<split>")
    try:
        rows: Any = datasets.load_dataset(*parts[:-1], split=parts[-1])
    except Exception as error:
        raise DataError(
            f"the Hub dataset {source} could not be loaded: {error}", do="check its name and the network"
        ) from error
    order = list(range(len(rows)))
    if shuffle:
        random.Random(0).shuffle(order)
    return [rows[i] for i in order[:limit]]


def _from_hub(task: Task, row: dict[str, Any], ours: bool) -> dict[str, Any]:
    """A Hub row as the task's templates want it: the fields that it lacks, and its label as a number."""
    fields = task.hub.fields if ours and task.hub else {}
    row = {**row, **{name: template.fill(text, row, task.name) for name, text in fields.items()}}
    label = row.get(task.label)
    if isinstance(label, str) and label.isdecimal():
        row[task.label] = int(label)
    return row


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
            do="pass its data: --task FILE, or --data ROWS with --prompt and --choices (or --answer); to calibrate, in "
            "Python by spectr.calibrate(..., own={name: texts})",
        )
    about = source.read_task(name, None if source.prompt else name)
    rows = source.rows(about, "train")
    if rows is None:
        raise DataError(f"no training data was named for '{name}'", do="use --data, or a task with training data")
    return read_examples(about, rows, root=source.root, limit=limit), source.origin(about, rows)
