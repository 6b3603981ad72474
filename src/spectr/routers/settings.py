"""What follows from a router's fields alone: how it selects, how it combines, whom it needs."""

from __future__ import annotations

from collections.abc import Sequence

from spectr.combine import get_combination
from spectr.errors import CompositionError
from spectr.routers.base import Router
from spectr.selection import Everyone, Selection, TopK, Weighting


def selection_of(router: Router) -> Selection:
    """From scores to weights: the ``top_k`` largest where the router has that field, else everyone."""
    k = getattr(router, "top_k", None)
    if k is None:
        return Everyone()
    weighting: Weighting = getattr(router, "weights", "uniform")
    return TopK(k=k, weighting=weighting, temperature=getattr(router, "temperature", 1.0))


def combination_of(router: Router) -> str:
    """A name that :func:`spectr.combine.get_combination` knows."""
    return getattr(router, "combine", "outputs")


def depends_on_residents(router: Router) -> bool:
    """Whether what a token gets depends on experts in memory that were not chosen, as with the combination knots."""
    return get_combination(combination_of(router)).prepare is not None


def residents(router: Router, experts: Sequence[str]) -> tuple[str, ...]:
    """Those of a library's experts that the model has to hold: all, or what the router's own ``resident`` says.

    Raises:
        CompositionError: The router cannot work with these experts.
    """
    own = getattr(router, "resident", None)
    if own is not None:
        return own(experts)
    top_k = getattr(router, "top_k", 1)
    if top_k > len(experts):
        raise CompositionError(
            f"top_k={top_k}, but the library has {len(experts)} expert{'s' * (len(experts) != 1)}",
            expected=f"top_k from 1 to {len(experts)}",
            do=f"choose top_k={len(experts)} or less, or add experts",
        )
    return tuple(experts)


def check_settings(router: Router, **choices: tuple[str, tuple[str, ...]]) -> None:
    """Raise :class:`CompositionError` for a field that is out of range.

    Args:
        router: Its ``combine``, ``top_k``, ``weights`` and ``temperature`` are checked, where it has them.
        choices: By a field's name its value, and those that it can have.
    """
    get_combination(combination_of(router))
    for name, (value, known) in choices.items():
        if value not in known:
            raise CompositionError(f"{name}={value!r}", expected=" or ".join(map(repr, known)))
    selection_of(router)
