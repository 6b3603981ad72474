"""What the layers of a composed model decide for some tokens of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectr.layers.batch_routing import LayerCall
from spectr.layers.routed import RoutedLinear


class Look(NamedTuple):
    """What was decided for one token.

    Attributes:
        shares: Each expert's weight summed over the routed layers, divided by their number.
        layers: Where it was asked for, by layer the chosen experts, ``{name: (weight, score)}``.
    """

    shares: Mapping[str, float]
    layers: tuple[Mapping[str, tuple[float, float]], ...] = ()


class Watch:
    """One call's decisions for some of its tokens.

    Args:
        layers: The routed layers, as they are for this call.
        rows: The tokens' places.
        in_full: Whether each layer's decision is wanted, or shares alone.
    """

    def __init__(self, layers: Sequence[RoutedLinear], rows: tuple[int, ...], in_full: bool):
        self._rows, self._in_full = rows, in_full
        self._numbers = {layer: number for number, layer in enumerate(layers)}
        self._held: list[tuple[str, ...]] = [()] * len(layers)
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(self, layer: RoutedLinear, x: Tensor) -> None:
        """What a layer is given, and so what it decides."""
        call = layer.in_force()
        if call.factors is not None and call.shown is not None:
            number = self._numbers[layer]
            self._held[number] = call.shown.experts
            self._found[number] = _explain(layer, x, call, self._rows)

    def looks(self) -> list[Look]:
        """What was decided for each of the tokens."""
        found = self._gathered()
        return [Look(self._shares(found, row), self._layers(found, row)) for row in range(len(self._rows))]

    def _gathered(self) -> dict[int, tuple[list[list[float]], list[list[float]]]]:
        """Scores and weights by layer, fetched for all layers of one shape at once."""
        alike: dict[object, list[int]] = {}
        for number, (scores_NC, _) in self._found.items():
            alike.setdefault((scores_NC.shape, scores_NC.device), []).append(number)
        found = {}
        for numbers in alike.values():
            both = torch.stack([torch.stack(self._found[number]) for number in numbers]).tolist()
            found |= {number: tuple(pair) for number, pair in zip(numbers, both, strict=True)}
        return found

    def _shares(self, found: Mapping[int, tuple[list[list[float]], list[list[float]]]], row: int) -> dict[str, float]:
        totals: dict[str, float] = {}
        for number, (_, weights) in found.items():
            for name, weight in zip(self._held[number], weights[row], strict=True):
                if weight > 0:
                    totals[name] = totals.get(name, 0.0) + weight
        return {name: total / len(self._held) for name, total in totals.items()}

    def _layers(
        self, found: Mapping[int, tuple[list[list[float]], list[list[float]]]], row: int
    ) -> tuple[Mapping[str, tuple[float, float]], ...]:
        if not self._in_full:
            return ()
        told: list[Mapping[str, tuple[float, float]]] = []
        for number, experts in enumerate(self._held):
            if number not in found:
                told.append({})
                continue
            scores, weights = (values[row] for values in found[number])
            rows = zip(experts, weights, scores, strict=True)
            told.append({name: (weight, score) for name, weight, score in rows if weight > 0})
        return tuple(told)


@torch.no_grad()
def _explain(layer: RoutedLinear, x: Tensor, call: LayerCall, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scores and weights of some tokens, (tokens, experts), float32."""
    fixed = call.fixed
    if fixed is not None:
        fixed = fixed._replace(shown_BTF=_rows(fixed.shown_BTF, rows))
    alone = call._replace(fixed=fixed, prior_BTE=_rows(call.prior_BTE, rows), among_BTE=_rows(call.among_BTE, rows))
    decision = layer.explain(x.flatten(0, -2)[list(rows)][None], alone)
    return decision.scores_TE[0].float(), decision.weights_TE[0].float()


def _rows(given_1TN: Any, rows: Sequence[int]) -> Any:
    return given_1TN if given_1TN is None or given_1TN.shape[1] == 1 else given_1TN[:, list(rows)]
