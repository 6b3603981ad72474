"""Put a library's experts into a model, and remove them again."""

from spectr.composition.compose import compose
from spectr.composition.paged import Paged
from spectr.composition.prepare import prepare_module, side_data
from spectr.composition.routed import Routed
from spectr.routers.evidence import Guide

__all__ = [
    "Guide",
    "Paged",
    "Routed",
    "compose",
    "prepare_module",
    "side_data",
]
