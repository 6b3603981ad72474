"""Checks that routers share."""

from __future__ import annotations

from collections.abc import Sequence

from spectr.combine import get_combination
from spectr.errors import CompositionError


def check_combination(combine: str, **choices: tuple[str, tuple[str, ...]]) -> None:
    """Raise :class:`CompositionError` for an unknown combination, or another argument outside its choices."""
    get_combination(combine)
    for name, (value, known) in choices.items():
        if value not in known:
            raise CompositionError(f"{name}={value!r}", expected=" or ".join(map(repr, known)))


def check_top_k(top_k: int, experts: Sequence[str]) -> None:
    """Raise :class:`CompositionError` where more experts are to be chosen than there are."""
    if top_k > len(experts):
        raise CompositionError(
            f"top_k={top_k}, but the library has {len(experts)} expert{'s' * (len(experts) != 1)}",
            expected=f"top_k from 1 to {len(experts)}",
            do=f"choose top_k={len(experts)} or less, or add experts",
        )
