"""Describing a library's experts in words: by whom, from which rows, and where the texts go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spectr.errors import DataError
from spectr.library.descriptions import write_descriptions
from spectr.shipped import open_library
from spectr.tasks.sources import Source, read_expert_rows

if TYPE_CHECKING:
    from spectr.models.writer import Writer
    from spectr.tasks import Example


@dataclass(frozen=True, kw_only=True)
class DescriptionPlan:
    """Experts that are to be described.

    Attributes:
        library: Folder of the experts; the texts go there.
        known: The descriptions that are there.
        rows: By expert the rows that the writer reads.
        text: The description itself, of one expert that needs no writer.
    """

    library: Path
    known: Mapping[str, str]
    rows: Mapping[str, Sequence[Example]]
    text: Mapping[str, str]


def read_description_plan(
    library: Path, names: Sequence[str], source: Source, *, text: str | None = None, limit: int = 3
) -> DescriptionPlan:
    """Read and check which experts are to be described, and what the writer reads of each.

    Args:
        library: Folder of the experts.
        names: Some of them; those without a description if empty.
        source: Task and data of the one expert; without any, each expert's are those of the shipped task of its name.
        text: The description itself, of one expert.
        limit: Rows that the writer reads of each expert.

    Raises:
        DataError: The text is empty or not for one expert, or rows cannot be read.
        LibraryError: There is no such library or expert.
    """
    experts = open_library(library)
    experts.check(*names)
    if text is not None and not text.strip():
        raise DataError("--text is empty", do="say what the expert is for")
    if text is not None and (len(names) != 1 or source.own):
        raise DataError(
            "--text is the whole description of one expert",
            do="name the expert, without data: spectr library describe NAME --text ...",
        )
    known = experts.descriptions
    if text is not None:
        return DescriptionPlan(library=library, known=known, rows={}, text={names[0]: " ".join(text.split())})
    chosen = names or [name for name in experts if name not in known]
    rows = {name: examples for name, (examples, _) in read_expert_rows(chosen, source, limit=limit).items()}
    return DescriptionPlan(library=library, known=known, rows=rows, text={})


def run_description_plan(
    plan: DescriptionPlan,
    writer: Callable[[], Writer],
    progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> tuple[Path, dict[str, str]]:
    """Have a plan's experts described; see :func:`spectr.guidance.describe`.

    Args:
        plan: Which, and from what.
        writer: Makes the language model that writes; called where one is needed.
        progress: Receives (phase, done, total, remark).

    Returns:
        The file, and the new descriptions by expert.
    """
    from spectr.guidance import describe

    found, write = dict(plan.text), writer() if plan.rows else None
    for done, (name, rows) in enumerate(plan.rows.items(), start=1):
        assert write is not None
        found[name] = describe(write, rows)
        progress("describing", done, len(plan.rows), name)
    return write_descriptions(plan.library, {**plan.known, **found}), found
