"""From weights to the update of a module's output: how the chosen experts are put together.

A combination is a function ``(h_TP, weights_TE, B_OP, owner_P) -> delta_TO`` with ``h = A x`` of all experts, and the
share of an expert's output factor that is dropped when it is prepared. By name: ``outputs``, ``factors``, ``ties``,
``dare``, ``dare-ties``; after a colon what is adjustable, ``ties:0.5`` or ``dare-ties:0.5:0.9``. One of another package
is called with the texts after the colons and returns a :class:`Combination`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from spectr.combine.dare import drop
from spectr.combine.factors import merge_factors
from spectr.combine.outputs import merge_outputs
from spectr.combine.ties import merge_ties
from spectr.errors import CompositionError
from spectr.registry import Registry, entry

NEEDS_EQUAL_RANKS = frozenset({"factors"})
_DENSITY, _RATE = 0.2, 0.5
_ARGUMENTS = {"outputs": (), "factors": (), "ties": (_DENSITY,), "dare": (_RATE,), "dare-ties": (_DENSITY, _RATE)}
_DENSITIES, _RATES = "DENSITY, what is kept, above 0 and at most 1", "RATE, what is dropped, from 0 to below 1"
_MEANING = {
    "ties": f"ties:{_DENSITIES}",
    "dare": f"dare:{_RATES}",
    "dare-ties": f"dare-ties:DENSITY:RATE; {_DENSITIES}; {_RATES}",
}
COMBINATIONS = tuple(_ARGUMENTS)


class Combination(NamedTuple):
    """How the chosen experts are put together; ``drop_rate`` of the output factors goes beforehand."""

    merge: Callable[..., Tensor]
    drop_rate: float = 0.0


REGISTRY: Registry[Combination] = Registry(
    kind="combination",
    group="spectr.combinations",
    error=CompositionError,
    entries={kind: entry("spectr.combine:get_combination", name=kind) for kind in _ARGUMENTS},
)


def get_combination(name: str) -> Combination:
    """A combination by name.

    Raises:
        CompositionError: The name is unknown, or a number after it is out of range.
    """
    kind, *numbers = name.split(":")
    if kind not in _ARGUMENTS:
        return REGISTRY.load(kind)(*numbers)
    defaults = _ARGUMENTS[kind]
    try:
        given = tuple(float(number) for number in numbers)
    except ValueError:
        given = (-1.0,)
    values = (*given, *defaults[len(given) :])
    density = values[0] if "ties" in kind else 1.0
    rate = values[-1] if "dare" in kind else 0.0
    if len(values) > len(defaults) or not (0 < density <= 1 and 0 <= rate < 1):
        raise CompositionError(
            f"combine={name!r}",
            expected=_MEANING.get(kind, f"no number after {kind}"),
        )
    if "ties" in kind:
        return Combination(partial(merge_ties, density=density), rate)
    return Combination(merge_factors if kind == "factors" else merge_outputs, rate)


__all__ = [
    "COMBINATIONS",
    "NEEDS_EQUAL_RANKS",
    "Combination",
    "drop",
    "get_combination",
    "merge_factors",
    "merge_outputs",
    "merge_ties",
]
