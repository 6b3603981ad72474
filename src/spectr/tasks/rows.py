"""Rows of a data set: JSONL files and the Hub's datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spectr.errors import DataError, MissingExtraError
from spectr.tasks.task import Example, Task


def read_rows(source: str, *, root: str | Path | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """All rows of a source, or its first ``limit``.

    Args:
        source: Path of a JSONL file, or ``hub:<dataset>[:<config>]:<split>``.
        root: Folder that a relative path starts from.
        limit: Rows at most.

    Raises:
        DataError: The file is missing, empty or holds a line that is not a JSON object; or the Hub has no such data.
    """
    rows = _hub_rows(source) if source.startswith("hub:") else _jsonl_rows(Path(root or ".") / source)
    if not rows:
        raise DataError(f"{source} holds no rows", expected="one JSON object a line", do="check the file")
    return rows[:limit]


def _jsonl_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise DataError(
            f"no data file at {path}", do="give the folder that holds it with --data-root, or its full path"
        )
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: {error}", expected="one JSON object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a {type(row).__name__}", expected="a JSON object")
        rows.append(row)
    return rows


def read_examples(
    task: Task, source: str, *, root: str | Path | None = None, limit: int | None = None
) -> list[Example]:
    """The examples that a task makes of a source's rows.

    Raises:
        DataError: As :func:`read_rows` does; or a row lacks a field or its label is out of range, with its number.
    """
    found = []
    for number, row in enumerate(read_rows(source, root=root, limit=limit), start=1):
        try:
            found.append(task.example(row))
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from error
    return found


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
        raise DataError(f"{path} holds no text", expected="one text a line")
    return lines


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 and the like are legal in JSON
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start})", do="convert it to UTF-8"
        ) from error


def _hub_rows(source: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading a Hub dataset", "train") from error
    parts = source.removeprefix("hub:").split(":")
    if len(parts) not in (2, 3):
        raise DataError(f"data source '{source}'", expected="hub:<dataset>:<split> or hub:<dataset>:<config>:<split>")
    try:
        return list(datasets.load_dataset(*parts[:-1], split=parts[-1]))  # pyright: ignore[reportReturnType]
    except Exception as error:
        raise DataError(
            f"the Hub dataset {source} could not be loaded: {error}", do="check its name and the network"
        ) from error
