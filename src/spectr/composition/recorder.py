"""Record what the layers of a composed model decide for some tokens of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectr.grouping import grouped
from spectr.layers.batch_routing import LayerCall
from spectr.layers.pairs import LayerInput, Pairs
from spectr.layers.routed_linear import RoutedLinear


class TokenRouting(NamedTuple):
    """The decisions for one token.

    Attributes:
        shares: Each expert's weight, averaged over the routed layers.
        layers: On request, the chosen experts by layer, ``{name: (weight, score)}``.
    """

    shares: Mapping[str, float]
    layers: tuple[Mapping[str, tuple[float, float]], ...] = ()


class Recorder:
    """One call's decisions for some of its tokens.

    Args:
        layers: The routed layers of this call.
        rows: Positions of the tokens.
        in_full: Whether to record each layer's decision instead of shares only.
    """

    def __init__(self, layers: Sequence[RoutedLinear], rows: tuple[int, ...], in_full: bool):
        self._rows, self._in_full = rows, in_full
        self._numbers = {layer: number for number, layer in enumerate(layers)}
        self._experts: list[tuple[str, ...]] = [()] * len(layers)
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(self, layer: RoutedLinear, x: LayerInput) -> None:
        """Record a layer's input, and so its decision."""
        call = layer.in_force()
        if call.factors is not None and call.shown is not None:
            number = self._numbers[layer]
            self._experts[number] = call.shown.experts
            self._found[number] = _explain(layer, x, call, self._rows)

    def routings(self) -> list[TokenRouting]:
        """The decisions for each token."""
        scores, weights = ({number: pair[part] for number, pair in self._found.items()} for part in (0, 1))
        return token_routings(self._experts, len(self._rows), weights, scores if self._in_full else None)


def token_routings(
    experts: Sequence[tuple[str, ...]],
    tokens: int,
    weights: Mapping[int, Tensor],
    scores: Mapping[int, Tensor] | None = None,
) -> list[TokenRouting]:
    """The layers' decisions for each token.

    Args:
        experts: Experts of each layer.
        tokens: Number of tokens.
        weights: By layer index, (tokens, experts); for layers where experts are used.
        scores: The same for scores, if each layer's decision is recorded.
    """
    layers = [()] * tokens if scores is None else _layers(experts, tokens, weights, scores)
    return [TokenRouting(*pair) for pair in zip(_shares(experts, tokens, weights), layers, strict=True)]


def _shares(
    experts: Sequence[tuple[str, ...]], tokens: int, weights: Mapping[int, Tensor]
) -> list[Mapping[str, float]]:
    """Layers with the same experts are summed before their values are fetched."""
    alike = grouped(((experts[number], weights_NE.device), number) for number, weights_NE in weights.items())
    totals: list[dict[str, float]] = [{} for _ in range(tokens)]
    for numbers in alike.values():
        sums = torch.stack([weights[number] for number in numbers]).sum(0, dtype=torch.float64).tolist()
        for total, row in zip(totals, sums, strict=True):
            for name, weight in zip(experts[numbers[0]], row, strict=True):
                if weight > 0:
                    total[name] = total.get(name, 0.0) + weight
    return [{name: weight / len(experts) for name, weight in total.items()} for total in totals]


def _layers(
    experts: Sequence[tuple[str, ...]], tokens: int, weights: Mapping[int, Tensor], scores: Mapping[int, Tensor]
) -> list[tuple[Mapping[str, tuple[float, float]], ...]]:
    """Values of all layers of one shape are fetched at once."""
    alike = grouped(((weights_NE.shape, weights_NE.device), number) for number, weights_NE in weights.items())
    found: dict[int, list[list[list[float]]]] = {}
    for numbers in alike.values():
        both = torch.stack([torch.stack([weights[number], scores[number]], dim=-1) for number in numbers])
        found |= zip(numbers, both.tolist(), strict=True)
    return [
        tuple(
            {
                name: (weight, score)
                for name, (weight, score) in zip(names, found[number][token], strict=True)
                if weight > 0
            }
            if number in found
            else {}
            for number, names in enumerate(experts)
        )
        for token in range(tokens)
    ]


@torch.no_grad()
def _explain(layer: RoutedLinear, x: LayerInput, call: LayerCall, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scores and weights of some tokens, (tokens, experts), float32."""
    if isinstance(x, Pairs):
        decision = layer.explain(x, call)
        return decision.scores_TE[list(rows)].float(), decision.weights_TE[list(rows)].float()
    fixed = call.fixed
    if fixed is not None:
        fixed = fixed._replace(shown_BTF=_rows(fixed.shown_BTF, rows))
    alone = call._replace(fixed=fixed, prior_BTE=_rows(call.prior_BTE, rows), among_BTE=_rows(call.among_BTE, rows))
    decision = layer.explain(x.flatten(0, -2)[list(rows)][None], alone)
    return decision.scores_TE[0].float(), decision.weights_TE[0].float()


def _rows(given_1TN: Any, rows: Sequence[int]) -> Any:
    return given_1TN if given_1TN is None or given_1TN.shape[1] == 1 else given_1TN[:, list(rows)]
