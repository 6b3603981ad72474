"""Shared by routers' files: checks of settings, and positions of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from spectr.combine import get_combination
from spectr.errors import CompositionError

if TYPE_CHECKING:
    from spectr.routers.router import Router


def check_settings(router: Router, **choices: tuple[str, tuple[str, ...]]) -> None:
    """Raise :class:`CompositionError` if a field is out of range.

    Args:
        router: Its ``combine`` and the parts of its selection are checked.
        choices: By field name, the value and the allowed values.
    """
    get_combination(router.combine)
    for name, (value, known) in choices.items():
        if value not in known:
            raise CompositionError(f"{name}={value!r}", expected=" or ".join(map(repr, known)))
    _ = router.selection


def check_counts(**counts: int) -> None:
    """Raise :class:`CompositionError` if a setting is not a whole number of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CompositionError(f"{name}={value}", expected="a whole number of at least 1")


def first_rows(ranks: Sequence[int]) -> Int[Tensor, " E"]:
    """The position of each expert's first row along P."""
    return torch.tensor((0, *ranks[:-1])).cumsum(0)
