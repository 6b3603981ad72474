"""Describe a library's experts in words: plan, writer, and file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spectr.errors import DataError
from spectr.library.description_file import read_descriptions, write_descriptions
from spectr.shipped import open_library
from spectr.tasks.rows import Source, read_expert_rows

if TYPE_CHECKING:
    from spectr.models.writer import Writer
    from spectr.tasks import Example


@dataclass(frozen=True, kw_only=True)
class DescriptionPlan:
    """Experts to describe.

    Attributes:
        library: Folder of the experts; the descriptions are written there.
        rows: For each expert, the rows that the writer reads.
        text: The description of one expert, which then needs no writer.
    """

    library: Path
    rows: Mapping[str, Sequence[Example]]
    text: Mapping[str, str]


def read_description_plan(
    library: Path, names: Sequence[str], source: Source, *, text: str | None = None, limit: int = 3
) -> DescriptionPlan:
    """Decide which experts to describe, and read the rows for the writer.

    Args:
        library: Folder of the experts.
        names: Experts to describe; if empty, those without a description.
        source: Task and data of a single expert. By default each expert has the shipped task of its name.
        text: The description of a single expert.
        limit: Number of rows that the writer reads for each expert.

    Raises:
        DataError: The text is empty or for several experts, or rows cannot be read.
        LibraryError: The library or an expert does not exist.
    """
    experts = open_library(library)
    experts.check(*names)
    if text is not None and not text.strip():
        raise DataError("--text is empty", do="describe what the expert is for")
    if text is not None and (len(names) != 1 or source.own):
        raise DataError(
            "--text describes exactly one expert",
            do="name one expert and omit the data: spectr library describe NAME --text ...",
        )
    known = experts.descriptions  # reports a damaged file before the model is loaded
    if text is not None:
        return DescriptionPlan(library=library, rows={}, text={names[0]: " ".join(text.split())})
    chosen = names or [name for name in experts if name not in known]
    rows = {name: examples for name, (examples, _) in read_expert_rows(chosen, source, limit=limit).items()}
    return DescriptionPlan(library=library, rows=rows, text={})


def run_description_plan(
    plan: DescriptionPlan,
    writer: Callable[[], Writer],
    progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> tuple[Path, dict[str, str]]:
    """Write a plan's descriptions; see :func:`spectr.guidance.describe`.

    Args:
        plan: The experts and their rows.
        writer: Makes the language model; called only if one is needed.
        progress: Called with (phase, done, total, remark).

    Returns:
        The file, and the new descriptions by expert.
    """
    from spectr.guidance import describe

    found, write = dict(plan.text), writer() if plan.rows else None
    for done, (name, rows) in enumerate(plan.rows.items(), start=1):
        assert write is not None
        found[name] = describe(write, rows)
        progress("describing", done, len(plan.rows), name)
    return write_descriptions(plan.library, {**read_descriptions(plan.library), **found}), found
