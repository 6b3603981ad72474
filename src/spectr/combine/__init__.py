"""From weights to the update of a module's output: how the chosen experts are put together.

By name: ``outputs``, ``factors``, ``ties``, ``dare``, ``dare-ties``, ``knots``; with options after a colon, as in
``ties:density=0.5``. An option is a share of entries, what is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from spectr.combine.base import Combination
from spectr.combine.factors import factors, merge_factors
from spectr.combine.knots import knots, merge_knots
from spectr.combine.options import parse, warn_of_numbers
from spectr.combine.outputs import dare, merge_outputs, outputs
from spectr.combine.ties import dare_ties, merge_ties, ties
from spectr.errors import CompositionError, did_you_mean

COMBINATIONS: dict[str, Callable[..., Combination]] = {
    "outputs": outputs,
    "factors": factors,
    "ties": ties,
    "dare": dare,
    "dare-ties": dare_ties,
    "knots": knots,
}


def get_combination(text: str) -> Combination:
    """A combination by its name and options, as in ``"dare:density=0.1"``.

    Raises:
        CompositionError: The name or an option is unknown, or an option is out of range.
    """
    kind = text.partition(":")[0]
    if kind not in COMBINATIONS:
        raise CompositionError(f"unknown combination combine={text!r}", do=did_you_mean(kind, COMBINATIONS))
    known = tuple(inspect.signature(COMBINATIONS[kind]).parameters)
    try:
        options = parse(text)[1]
    except ValueError:
        options = {"": 0.0}
    if not (options.keys() <= set(known) and all(0 < share <= 1 for share in options.values())):
        spelled = f"{kind}:{','.join(f'{option}=SHARE' for option in known)}"
        shares = f"{spelled}, a SHARE that is kept, above 0 and at most 1"
        raise CompositionError(f"combine={text!r}", expected=shares if known else f"no options after {kind}")
    warn_of_numbers(text, kind, options)
    return COMBINATIONS[kind](**options)


__all__ = [
    "COMBINATIONS",
    "Combination",
    "get_combination",
    "merge_factors",
    "merge_knots",
    "merge_outputs",
    "merge_ties",
]
