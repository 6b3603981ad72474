"""What holds for a layer alone, as a composed model's call has it for all of its layers."""

from __future__ import annotations

from contextlib import contextmanager

from spectr.layers.batch_routing import BatchRouting, routed_by


def routing_of(layer, weights=None, prior=None, among=None):
    """Rows of fixed weights, of a prior, or of the experts that may be chosen, (rows, experts)."""
    factors = None
    if weights is not None:
        names = tuple(name for name, some in zip(layer.experts, (weights != 0).any(0).tolist(), strict=True) if some)
        factors = {layer: layer.subset(names)}
    rows = [None if given is None else given[:, None] for given in (weights, prior, among)]
    return BatchRouting(layer.experts, *rows, factors=factors)


@contextmanager
def holding(layer, weights=None, prior=None, among=None):
    with routed_by(routing_of(layer, weights, prior, among)):
        yield
