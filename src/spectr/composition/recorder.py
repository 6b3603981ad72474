"""What the layers of a composed model decide for some tokens of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectr.layers.batch_routing import LayerCall
from spectr.layers.routed import RoutedLinear


class TokenRouting(NamedTuple):
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

    def routings(self) -> list[TokenRouting]:
        """What was decided for each of the tokens."""
        return token_routings(self._held, self._found, len(self._rows), self._in_full)


def token_routings(
    experts: Sequence[tuple[str, ...]], found: Mapping[int, tuple[Tensor, Tensor]], tokens: int, in_full: bool
) -> list[TokenRouting]:
    """What layers decided, token by token.

    Args:
        experts: Of each layer.
        found: Scores and weights, (tokens, experts), of the layers that have some, by their numbers.
        tokens: How many there are.
        in_full: Whether each layer's decision is wanted, or shares alone.
    """
    rows = _gathered(found)
    return [_token_routing(experts, rows, token, in_full) for token in range(tokens)]


_Rows = Mapping[int, tuple[list[list[float]], list[list[float]]]]


def _gathered(found: Mapping[int, tuple[Tensor, Tensor]]) -> _Rows:
    """Scores and weights by layer, fetched for all layers of one shape at once."""
    alike: dict[object, list[int]] = {}
    for number, (scores_NC, _) in found.items():
        alike.setdefault((scores_NC.shape, scores_NC.device), []).append(number)
    rows = {}
    for numbers in alike.values():
        both = torch.stack([torch.stack(found[number]) for number in numbers]).tolist()
        rows |= {number: tuple(pair) for number, pair in zip(numbers, both, strict=True)}
    return rows


def _token_routing(experts: Sequence[tuple[str, ...]], rows: _Rows, token: int, in_full: bool) -> TokenRouting:
    totals: dict[str, float] = {}
    layers: list[Mapping[str, tuple[float, float]]] = []
    for number, names in enumerate(experts):
        scores, weights = (values[token] for values in rows[number]) if number in rows else ((), ())
        chosen = {n: (w, s) for n, w, s in zip(names, weights, scores, strict=True) if w > 0}
        layers.append(chosen)
        for name, (weight, _) in chosen.items():
            totals[name] = totals.get(name, 0.0) + weight
    return TokenRouting(
        {name: total / len(experts) for name, total in totals.items()}, tuple(layers) if in_full else ()
    )


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
