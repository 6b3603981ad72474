"""Follow the first calls of a composed model if it is unknown whether the model calls all of its layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from spectr.errors import CompositionError, raise_together
from spectr.grouping import grouped
from spectr.layers.expert_factors import Factors
from spectr.layers.plan import uncalled_fault, united
from spectr.layers.routed_linear import RoutedLinear
from spectr.layers.weight_reads import WeightReads, uncompiled


class FirstCalls:
    """Follows the first call with each set of arguments, until all layers are known to be called.

    Args:
        model: The composed model.
        unknown: Names of the routed layers whose use is unknown.
    """

    def __init__(self, model: nn.Module, unknown: Collection[str]):
        self.model, self.unknown = model, set(unknown)
        self._kinds: set[tuple[Any, ...]] = set()

    @contextmanager
    def followed(self, part: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
        """A call of the model or of a part of it.

        Raises:
            CompositionError: The call used weights that an expert changes without calling their layer.
        """
        kind = _kind(part, given) if self.unknown else None
        if kind is None or kind in self._kinds:
            yield
            return
        with uncompiled(), WeightReads(self.model) as reads:
            yield
        layers = {name: self.model.get_submodule(name) for name in reads.outside & self.unknown}
        changed = grouped(
            (expert, name)
            for name, layer in layers.items()
            if isinstance(layer, RoutedLinear)
            for expert in _changing(layer.in_force().factors)
        )
        problems = united({expert: [uncalled_fault(names)] for expert, names in changed.items()})
        raise_together("experts have no effect in this call", problems, CompositionError)
        self.unknown -= reads.called
        self._kinds.add(kind)


def _kind(part: nn.Module, given: Mapping[str, Any]) -> tuple[Any, ...]:
    return type(part), part.training, frozenset(name for name, value in given.items() if value is not None)


def _changing(factors: Factors | None) -> set[str]:
    """The experts whose updates are not zero."""
    if factors is None:
        return set()
    rows_P = factors.B_OP.any(0) if factors.mix_PR is not None else factors.B_OP.any(0) & factors.A_PI.any(1)
    return {factors.experts[number] for number in factors.owner_P[rows_P].unique().tolist()}
