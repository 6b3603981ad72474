"""From weights to the update of a module's output: how the chosen experts are put together.

A combination is a function ``(h_TP, weights_TE, experts) -> delta_TO`` with ``h = A x`` of all experts.
"""

from collections.abc import Callable

from spectr.combine.factors import merge_factors
from spectr.combine.outputs import merge_outputs

COMBINATIONS: dict[str, Callable] = {"outputs": merge_outputs, "factors": merge_factors}
NEEDS_EQUAL_RANKS = frozenset({"factors"})

__all__ = ["COMBINATIONS", "NEEDS_EQUAL_RANKS", "merge_factors", "merge_outputs"]
