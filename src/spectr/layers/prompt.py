"""Decisions for whole prompts: a prompt is read before it is answered, and what was found is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.errors import CompositionError
from spectr.layers.routed import RoutedLinear
from spectr.routers.base import PromptRouter

Reader = Callable[..., Float[Tensor, "B E"]]
Bring = Callable[[Sequence[str]], None]


class PromptDecision:
    """Has a prompt read, decides, and has a composed model's layers hold the decision.

    Watches the calls of the model (of its encoder, where it has one): a call without a filled cache begins a prompt
    and is decided anew, a call that goes on with a cache keeps the decision.

    Args:
        entry: The module that reads prompts (:func:`entry_of`).
        layers: The model's routed layers by name.
        router: Turns what was read into weights, or into a prior.
        experts: All experts, in alphabetical order.
        read: Called as the entry is; what speaks for each expert, (batch, experts). While it runs the layers are
            asleep, so that the model is the base model, and calls of the model are not watched.
        bring: Where the layers do not hold all experts: has them hold those that are named, before a decision is held.
    """

    def __init__(
        self,
        entry: nn.Module,
        layers: Mapping[str, RoutedLinear],
        router: PromptRouter,
        experts: Sequence[str],
        read: Reader,
        bring: Bring = lambda _: None,
    ):
        self.entry, self.layers, self.router = entry, dict(layers), router
        self.experts, self.read, self.bring = tuple(experts), read, bring
        self._places = {name: place for place, name in enumerate(self.experts)}
        self.weights_BE: Tensor | None = None
        self._pinned = self._reading = False
        self._handle = self.entry.register_forward_pre_hook(self._on_call, with_kwargs=True)

    def decide(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """Have a prompt read and return what is to be held of it, without holding it.

        The experts' weights; or, of a router that decides for each token with the prompt as prior, the prior.

        Args:
            args: As the model (or its encoder) is called.
            kwargs: Likewise.
        """
        return self.router.verdict(self.evidence(*args, **kwargs))

    @torch.no_grad()
    def evidence(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B E"]:
        """What speaks for each expert, as the reader says."""
        self._reading = True
        for layer in self.layers.values():
            layer.asleep = True
        try:
            return self.read(*args, **kwargs)
        finally:
            self._reading = False
            for layer in self.layers.values():
                layer.asleep = False

    def hold(self, weights_BE: Float[Tensor, "B E"] | None, *, pin: bool = True) -> None:
        """Have all layers hold these weights, or choose by this prior or among these; pinned, until ``hold(None)``."""
        if weights_BE is not None:
            self.bring([self.experts[place] for place in (weights_BE != 0).any(0).nonzero()[:, 0].tolist()])
        for layer in self.layers.values():
            if not layer.experts:
                continue
            chosen = [self._places[name] for name in layer.experts]
            self._tell(layer, None if weights_BE is None else weights_BE[:, chosen])
        self.weights_BE, self._pinned = weights_BE, pin and weights_BE is not None

    def _tell(self, layer: RoutedLinear, weights_BE: Float[Tensor, "B E"] | None) -> None:
        if self.router.level == "prompt":
            layer.hold(weights_BE)
            return
        if self.router.level == "shortlist":
            layer.narrow(None if weights_BE is None else weights_BE != 0)
        if getattr(self.router, "informs", True):
            layer.inform(weights_BE)

    def close(self) -> None:
        """Stop watching the model."""
        self._handle.remove()

    def _on_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pinned or self._reading:
            return
        if _goes_on(kwargs):
            if self.weights_BE is None:
                raise CompositionError(
                    "the cache was filled before the model was composed", do="read the prompt again, without that cache"
                )
            given = next(
                (t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None
            )
            if isinstance(given, Tensor) and len(given) != len(self.weights_BE):
                raise CompositionError(
                    f"the cache goes on with {len(given)} rows, and {len(self.weights_BE)} were decided on",
                    do="decide on all rows and hold that: prompt.hold(prompt.decide(...))",
                )
            return
        self.hold(self.decide(*args, **kwargs), pin=False)


@contextmanager
def pinned(decision: PromptDecision, weights_BE: Float[Tensor, "B E"]) -> Iterator[None]:
    """Hold a decision while the block runs."""
    decision.hold(weights_BE)
    try:
        yield
    finally:
        decision.hold(None)


def decides_by_prompt(model: nn.Module) -> bool:
    """Whether a model is composed with a router that reads a prompt before it answers."""
    routers = (module.router for module in model.modules() if isinstance(module, RoutedLinear))
    router = next(routers, None)
    return isinstance(router, PromptRouter) and router.level != "token"


def entry_of(model: nn.Module) -> nn.Module:
    """The module that reads prompts."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()  # pyright: ignore[reportCallIssue]
    return model


def _goes_on(kwargs: Mapping[str, Any]) -> bool:
    cache = kwargs.get("past_key_values")
    return cache is not None and int(cache.get_seq_length()) > 0
