"""Routed layers inside any model: planning, checking, swapping in and out, and watching what is chosen."""

from spectr.layers.linear import Features, features
from spectr.layers.plan import Plan, make_plan
from spectr.layers.routed import RoutedLinear
from spectr.layers.swap import swap_module
from spectr.layers.trace import LayerTrace, Trace, trace

__all__ = [
    "Features",
    "LayerTrace",
    "Plan",
    "RoutedLinear",
    "Trace",
    "features",
    "make_plan",
    "swap_module",
    "trace",
]
