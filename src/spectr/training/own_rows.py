"""The rows that trained an expert, by its record (``expert.json``, which ``spectr train`` writes)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spectr.adapters import CARD_DATA, Expert


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
