"""Which row of a batch each image, video or sound belongs to, by the tokens that stand for them in the text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

_KINDS = {"video": ("video",), "audio": ("audio", "speech", "input_features", "input_values")}  # else images
_BATCHED = 6  # axes of images that are (rows, images of a row, tiles, channels, height, width)


class InputRows(NamedTuple):
    """The rows that an input's entries along its first axis belong to.

    Attributes:
        row_N: Their numbers; ``None`` where they are not known.
        certain: Whether nothing else is possible. Rows that are not certain have to be seen where the input meets the
            text.
    """

    row_N: Int[Tensor, " N"] | None
    certain: bool


def rows_of_input(name: str, value: Tensor, ids: Any, config: Any, rows: int) -> InputRows:
    """The rows of an input that is no text.

    Args:
        name: Of the argument, as in ``"pixel_values"``.
        value: What is given, (N, ...).
        ids: The batch's token ids, (rows, tokens), where there are any.
        config: Of the model; it names the tokens that stand for images, videos and sounds.
        rows: Of the batch.
    """
    there, one_each = len(value), torch.arange(rows)
    if rows == 1:
        return InputRows(torch.zeros(there, dtype=torch.long), certain=True)
    places = _placeholders(name, config)
    if not places:
        return InputRows(one_each if there == rows else None, certain=True)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != rows:
        return InputRows(one_each if there == rows else None, certain=False)
    counts_B = torch.isin(ids, torch.tensor(sorted(places), device=ids.device)).sum(1).cpu()
    total = int(counts_B.sum())
    if there == rows and (not total or value.ndim >= _BATCHED or bool((counts_B > 0).all())):
        return InputRows(one_each, certain=True)
    if total and not bool((counts_B * there % total).any()):
        return InputRows(one_each.repeat_interleave(counts_B * there // total), certain=False)
    return InputRows(one_each if there == rows else None, certain=False)


def _placeholders(name: str, config: Any) -> set[int]:
    """The tokens that stand for what an argument holds."""
    kind = next((kind for kind, words in _KINDS.items() if any(word in name for word in words)), "image")
    found = (getattr(config, f"{kind}_token_{end}", None) for end in ("id", "index"))
    return {value for value in found if isinstance(value, int)}
