"""Factors of sets of experts, for calls where rows have their own weights or shortlists."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from spectr.layers.batch_routing import outside_inference_mode
from spectr.layers.expert_factors import Factors
from spectr.layers.routed_linear import RoutedLinear

Table = Mapping[RoutedLinear, Factors | None]
Make = Callable[[Sequence[RoutedLinear], tuple[str, ...]], Table]

_SINGLE, _GATHERED = 64, 2  # cached sets: of one expert, which are views, and of several, which are copies


def held_factors(layers: Sequence[RoutedLinear], names: tuple[str, ...]) -> Table:
    """The factors in the layers."""
    return {layer: layer.subset(names) for layer in layers}


class FactorSets:
    """Factors of every layer by set of experts. All sequences share them; the most recently used are cached.

    Args:
        layers: The routed layers.
        make: Maps layers and names to factors.
        single: Number of cached sets of one expert.
        gathered: Number of cached sets of several experts.
        serve_choices: Whether tokens can choose among its factors, which then include all that a router reads.
            Otherwise only fixed weights can be applied.
    """

    def __init__(
        self,
        layers: Iterable[RoutedLinear],
        make: Make = held_factors,
        *,
        single: int = _SINGLE,
        gathered: int = _GATHERED,
        serve_choices: bool = False,
    ):
        self._layers, self._make, self.single, self.gathered = tuple(layers), make, single, gathered
        self.serve_choices = serve_choices
        self._tables: OrderedDict[tuple[str, ...], tuple[tuple[Factors | None, ...], Table]] = OrderedDict()
        self._lock = threading.Lock()

    def table(self, names: tuple[str, ...]) -> Table:
        """Every layer's factors of these experts; computed if they are missing or the layers changed."""
        current = tuple(layer.factors for layer in self._layers)
        with self._lock:
            found = self._tables.get(names)
            if found is None or any(a is not b for a, b in zip(found[0], current, strict=True)):
                self._forget(room=1)
                with outside_inference_mode():
                    found = self._tables[names] = current, self._make(self._layers, names)
            self._tables.move_to_end(names)
            self._forget()
        return found[1]

    def _forget(self, room: int = 0) -> None:
        for several, most in ((False, self.single), (True, self.gathered)):
            names = [kept for kept in self._tables if (len(kept) > 1) == several]
            for old in names[: max(0, len(names) + room - most)]:
                del self._tables[old]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which create their own."""
        return {**vars(self), "_tables": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())
