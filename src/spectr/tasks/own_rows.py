"""The rows that trained an expert, by its record (``expert.json``, which ``spectr train`` writes)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spectr.adapters import CARD_DATA, Expert
from spectr.library import ExpertLibrary
from spectr.tasks.rows import Source, read_expert_rows
from spectr.tasks.task import Example


def read_own_rows(
    library: ExpertLibrary, names: Sequence[str], source: Source, *, limit: int | None = None
) -> dict[str, tuple[list[Example], dict[str, Any]]]:
    """For each expert the rows that trained it, or all rows if its record does not say which; and their origin.

    The origin has the numbers of the first and the last row under ``rows``, if these are known to have trained it.

    Args:
        library: The experts.
        names: Those to read rows for.
        source: See :func:`spectr.tasks.rows.read_expert_rows`, which also has the errors.
        limit: Maximum number of rows for each expert.
    """
    found = {}
    for name, (rows, origin) in read_expert_rows(names, source).items():
        places = own_rows(library[name], origin)
        own = rows[places or slice(None)][:limit]
        known = {} if places is None else {"rows": [places.start + 1, places.start + len(own)]}
        found[name] = own, {**origin, **known}
    return found


def own_rows(expert: Expert, origin: Mapping[str, Any]) -> slice | None:
    """Places of the rows that trained an expert in its training data, without those held out for validation.

    Args:
        expert: The expert, in its folder.
        origin: Origin of the data, of :meth:`spectr.tasks.rows.Source.origin`. A file is known by its hash, a dataset
            of the Hub by its name and task.

    Returns:
        ``None`` if there is no record, or it is of other data.
    """
    try:
        record = json.loads((expert.weights.parent / CARD_DATA).read_text(encoding="utf-8"))
        same = ("train sha256",) if "train sha256" in origin else ("train", "task")
        held_out, count = int(record["validation_examples"]), int(record["train_examples"])
        known = all(record["data"][key] == origin[key] for key in same)
    except (OSError, ValueError, LookupError, TypeError):  # no file, or another program's
        return None
    return slice(held_out, held_out + count) if known else None
