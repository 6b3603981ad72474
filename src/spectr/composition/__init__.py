"""Putting a library's experts into a model, and taking them out again."""

from spectr.composition.compose import compose
from spectr.composition.paged import Paged
from spectr.composition.prepare import (
    needed_calibration,
    needed_descriptions,
    needed_gates,
    needed_index,
    prepare_module,
)
from spectr.composition.routed import Guide, Routed

__all__ = [
    "Guide",
    "Paged",
    "Routed",
    "compose",
    "needed_calibration",
    "needed_descriptions",
    "needed_gates",
    "needed_index",
    "prepare_module",
]
