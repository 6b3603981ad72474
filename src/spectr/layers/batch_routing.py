"""The routing of one forward call by row, and how a layer finds it.

A call of a composed model has one :class:`BatchRouting`. The model's entry sets it for the thread that runs the call,
and every routed layer reads it. Nothing is written into layers, so that threads and sequences do not interfere.

Legend: B rows of the batch, T tokens of a row (1: the same for all of a row's tokens), E experts, P rows of factors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spectr.errors import CompositionError

if TYPE_CHECKING:
    from spectr.layers.expert_factors import Factors
    from spectr.layers.routed_linear import RoutedLinear
    from spectr.layers.token_layout import TokenPlaces

Observe = Callable[["RoutedLinear", Any], None]


class FixedWeights(NamedTuple):
    """Weights that do not depend on tokens: of the experts that are used, and of all experts that a layer shows."""

    weights_BTE: Float[Tensor, "B T E"]
    weights_BTP: Float[Tensor, "B T P"]
    shown_BTF: Float[Tensor, "B T F"]


class LayerCall(NamedTuple):
    """The routing of one layer in one call.

    Attributes:
        factors: Factors of the experts that are computed; ``None``: the base layer alone.
        shown: Factors of the experts that a trace shows.
        fixed: Their weights, if these do not depend on the tokens.
        prior_BTE: Multiplies or shifts the scores, depending on the router; float32.
        among_BTE: Experts that may be chosen; by default all.
        observe: Receives the layer and its input before it computes.
        some_base: Whether some rows have only fixed weights of zero, so that their output is the base layer's.
    """

    factors: Factors | None
    shown: Factors | None
    fixed: FixedWeights | None = None
    prior_BTE: Float[Tensor, "B T E"] | None = None
    among_BTE: Bool[Tensor, "B T E"] | None = None
    observe: Observe | None = None
    some_base: bool = False


@dataclass(frozen=True, eq=False)
class BatchRouting:
    """The routing of each row (or token) of a call, by expert. Made once and used by any number of calls.

    Attributes:
        experts: Names of the columns.
        weights_BTE: Fixed weights; ``None`` if tokens choose.
        prior_BTE: A prior for the scores of tokens that choose.
        among_BTE: Experts that they may choose; by default all.
        factors: By layer, the factors of the experts that are used; ``None``: those in the layer.
        base_only: No expert is used.
        observe: Receives each layer and its input.
    """

    experts: tuple[str, ...] = ()
    weights_BTE: Float[Tensor, "B T E"] | None = None
    prior_BTE: Float[Tensor, "B T E"] | None = None
    among_BTE: Bool[Tensor, "B T E"] | None = None
    factors: Mapping[RoutedLinear, Factors | None] | None = None
    base_only: bool = False
    observe: Observe | None = None
    _calls: dict[RoutedLinear, LayerCall] = field(default_factory=dict, init=False, repr=False)
    _only: dict[tuple[str, ...], Tensor] = field(default_factory=dict, init=False, repr=False)
    _alike: dict[tuple[Any, ...], LayerCall] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def several(self) -> bool:
        """Whether several experts are used, so that their factors are copies."""
        rows_BTE = self.weights_BTE if self.weights_BTE is not None else self.among_BTE
        return rows_BTE is not None and int((rows_BTE != 0).flatten(0, 1).any(0).sum()) > 1

    def only_expert(self, experts: tuple[str, ...]) -> Int[Tensor, "B T"]:
        """For each row, the index of the one expert among these that it holds; -1 if it holds none of them.

        Raises:
            CompositionError: A row mixes one of them with others, or holds a part of it.
        """
        known = self._only.get(experts)
        if known is None:
            with outside_inference_mode():
                known = self._only[experts] = self._numbers(experts)
        return known

    def _numbers(self, experts: tuple[str, ...]) -> Int[Tensor, "B T"]:
        if self.base_only:
            return torch.full((1, 1), -1)
        rows_BTE = self.weights_BTE if self.weights_BTE is not None else self.among_BTE
        if rows_BTE is None:
            rows_BTE = torch.ones(1, 1, len(self.experts))
        taking_BTE = rows_BTE != 0
        own_BTN = torch.zeros(*rows_BTE.shape[:2], len(experts), dtype=torch.bool, device=rows_BTE.device)
        for place, name in enumerate(experts):
            if name in self.experts:
                own_BTN[..., place] = taking_BTE[..., self.experts.index(name)]
        alone_BT = (taking_BTE.sum(-1) == 1) & (rows_BTE.sum(-1) == 1)
        if bool((own_BTN.any(-1) & ~alone_BT).any()):
            raise CompositionError(
                f"a row mixes experts, or uses a part of one, but {', '.join(experts)} have trained modules",
                expected="one expert for a whole prompt, with the weight 1",
                do="use a verdict of one expert: prompt.using, prompt.hold",
            )
        return torch.where(own_BTN.any(-1), own_BTN.int().argmax(-1), -1).cpu()

    @property
    def differs(self) -> bool:
        """Whether rows or tokens differ in their numbers."""
        return any(size > 1 for shape in self._shapes for size in shape)

    @property
    def by_token(self) -> bool:
        """Whether tokens differ in their numbers."""
        return any(tokens > 1 for _, tokens in self._shapes)

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        given = (self.weights_BTE, self.prior_BTE, self.among_BTE)
        return [tuple(rows_BTE.shape[:2]) for rows_BTE in given if rows_BTE is not None]

    def of(self, layer: RoutedLinear) -> LayerCall:
        """The routing of this layer."""
        if self.base_only:  # one object serves all models, and must not keep their layers
            return self._of(layer)
        known = self._calls.get(layer)
        if known is None:
            known = self._calls[layer] = self._of(layer)
        return known

    def _of(self, layer: RoutedLinear) -> LayerCall:
        own = layer.factors
        factors = own if self.factors is None else self.factors.get(layer)
        if self.base_only or factors is None:
            return LayerCall(None, own, observe=self.observe)
        shown = own or factors
        key = (factors.experts, factors.ranks, shown.experts, factors.A_PI.device, factors.A_PI.dtype)
        alike = self._alike.get(key)  # layers of the same experts and ranks share tensors
        if alike is None:
            with outside_inference_mode():
                alike = self._alike[key] = self._resolved(factors, shown)
        return alike._replace(factors=factors, shown=shown)

    def _resolved(self, factors: Factors, shown: Factors) -> LayerCall:
        device = factors.A_PI.device
        fixed = None
        if self.weights_BTE is not None:
            weights_BTE = self._columns(self.weights_BTE, factors).to(device)
            weights_BTP = weights_BTE[..., factors.owner_P].to(factors.A_PI.dtype).contiguous()
            fixed = FixedWeights(weights_BTE, weights_BTP, self._columns(self.weights_BTE, shown).to(device))
        prior = None if self.prior_BTE is None else self._columns(self.prior_BTE, factors)
        among = None if self.among_BTE is None else self._columns(self.among_BTE, factors)
        return LayerCall(
            None,
            None,
            fixed,
            None if prior is None else prior.to(device, torch.float32).contiguous(),
            None if among is None or bool(among.all()) else among.to(device),
            self.observe,
            fixed is not None and not bool((fixed.weights_BTE != 0).any(-1).all()),
        )

    def _columns(self, rows_BTE: Tensor, factors: Factors) -> Tensor:
        return rows_BTE[..., [self.experts.index(name) for name in factors.experts]]


BASE = BatchRouting(base_only=True)


class Span(NamedTuple):
    """Tokens of a call that one branch of a :class:`spectr.layers.multi_routed.MultiRoutedLinear` computes.

    Attributes:
        branch: Its number.
        tokens: Places along the token axis.
        routing: What holds for them.
    """

    branch: int
    tokens: slice | Tensor
    routing: BatchRouting | None


class _Thread(threading.local):
    """The state of a thread's call.

    Attributes:
        routing: The routing; ``None``: every token chooses among all experts.
        places: Where the call's tokens are among a layer's inputs, if known.
        kept: If tokens have their own weights, the tokens that the output head receives.
        spans: Spans for layers with several routers.
        watched: Number of open traces, for which calls must know their tokens' places.
    """

    routing: BatchRouting | None = None
    places: TokenPlaces | None = None
    kept: slice | Tensor | None = None
    spans: Sequence[Span] = ()
    watched: int = 0


thread = _Thread()


@contextmanager
def routed_by(
    routing: BatchRouting | None,
    places: TokenPlaces | None = None,
    kept: slice | Tensor | None = None,
    spans: Sequence[Span] = (),
) -> Iterator[None]:
    """Use this routing for the thread's calls inside the block."""
    before = thread.routing, thread.places, thread.kept, thread.spans
    thread.routing, thread.places, thread.kept, thread.spans = routing, places, kept, spans
    try:
        yield
    finally:
        thread.routing, thread.places, thread.kept, thread.spans = before


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """For tensors that are stored: later calls may need gradients, which inference mode does not allow."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def base_alone() -> bool:
    """Whether this thread's calls are the base model's, for example while it reads a prompt for a decision."""
    return thread.routing is not None and thread.routing.base_only


def spread(rows_BTN: Tensor, layer: nn.Module, x: Tensor) -> Tensor:
    """Rows' numbers in a shape that broadcasts over the leading axes of a layer's input.

    Raises:
        CompositionError: Rows differ, and the input's tokens cannot be assigned to them.
    """
    rows, tokens = rows_BTN.shape[:2]
    leading, places = x.shape[:-1], thread.places
    if rows == tokens == 1 or not leading.numel():  # or no token at all
        return rows_BTN[:1, :1].reshape(*(1 for _ in leading), -1)
    if places is not None and (tokens == 1 or rows > 1):
        wide = _spread_rows(rows_BTN, places, layer, x)
        if wide is not None:
            return wide
    elif tokens == 1 and leading[0] == rows:
        return rows_BTN.view(rows, *(1 for _ in leading[1:]), -1)
    elif places is not None and rows == 1 and places.is_followed(layer) and layer not in places.paired:
        position_L = places.positions(layer, x) if tokens == places.tokens else None
        if position_L is not None:
            return rows_BTN[0][position_L.to(rows_BTN.device)]
        if tuple(leading) != (1, tokens):
            raise _not_tracked(leading, rows)
    if leading[-1] != tokens and thread.kept is not None:
        rows_BTN = rows_BTN[:, thread.kept]
        tokens = rows_BTN.shape[1]
    if tokens > 1 or thread.kept is not None:
        if tuple(leading) == (rows, tokens):
            return rows_BTN
        if rows == 1 and leading.numel() == tokens:
            return rows_BTN[0].view(*leading, -1)
    raise _not_tracked(leading, rows)


def _spread_rows(rows_BTN: Tensor, places: TokenPlaces, layer: nn.Module, x: Tensor) -> Tensor | None:
    """Numbers of rows, or of tokens in several rows; ``None`` where the input's shape has to say where they belong."""
    if rows_BTN.shape[1] == 1:
        return places.spread(rows_BTN[:, 0], layer, x)
    found = places.places(layer, x)
    if found is None and thread.kept is None:  # the output head may receive some of the tokens
        raise _not_tracked(x.shape[:-1], len(rows_BTN))
    return None if found is None else rows_BTN[tuple(index_L.to(rows_BTN.device) for index_L in found)]


def _not_tracked(leading: Sequence[int], rows: int) -> CompositionError:
    return CompositionError(
        f"a layer receives tokens of shape {tuple(leading)} in a batch of {rows} rows that have different experts",
        expected="tokens that can be tracked from the model's arguments to the layer",
        do="run one prompt at a time",
    )
