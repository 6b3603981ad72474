"""What routing costs as SpectR's section 5 counts it: from sizes alone, whatever is executed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from spectr.adapters import Expert

COLUMNS = (
    "scores, MFLOP a token",
    "update, factors merged",
    "update, outputs",
    "stored, MB",
)
_BYTES = 2  # of a number in bfloat16


class Count(NamedTuple):
    """Of one method, over all modules: operations a token (a multiply-add counts as 2), and bytes.

    Attributes:
        scores: To score the experts.
        merged: To apply what the chosen experts' merged factors give.
        outputs: To apply each chosen expert, and add.
        stored: Experts and what scores them.
    """

    scores: float
    merged: float
    outputs: float
    stored: float


def by_method(experts: Sequence[Expert], k: int = 4) -> dict[str, Count]:
    """Arrow, SpectR and mu, from the sizes of the experts; of unequal ranks their mean.

    Args:
        experts: The library.
        k: Experts for each token.

    Source: SpectR (Fleshman and Van Durme, 2025), section 5.
    """
    totals = {name: [0.0] * 4 for name in ("arrow", "spectr", "mu, folded into W", "mu, factors merged")}
    for module in {module for expert in experts for module in expert.shapes}:
        shapes = [expert.shapes[module] for expert in experts if module in expert.shapes]
        count, taken = len(shapes), min(k, len(shapes))
        rank = sum(shape.rank for shape in shapes) / count
        inputs, outputs = shapes[0].inputs, shapes[0].outputs
        into, out, adapters = 2 * rank * inputs, 2 * rank * outputs, _BYTES * count * rank * (inputs + outputs)
        for name, counted in {
            "arrow": (2 * count * inputs, into + out, taken * (into + out), adapters + _BYTES * count * inputs),
            "spectr": (count * into, out, taken * out, adapters),
            "mu, folded into W": (0, 0, 0, 0),
            "mu, factors merged": (0, into + out, into + out, adapters / count),
        }.items():
            totals[name] = [total + value for total, value in zip(totals[name], counted, strict=True)]
    return {name: Count(*values) for name, values in totals.items()}
