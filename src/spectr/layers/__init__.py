"""Routed layers inside any model: plan them, swap them in and out, and record what they choose."""

from spectr.layers.linear_layers import Features, features
from spectr.layers.plan import Plan, make_plan
from spectr.layers.routed_linear import RoutedLinear
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
