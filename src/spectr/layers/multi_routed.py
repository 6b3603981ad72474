"""A linear layer that several routers have routed, each for its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from spectr.layers.batch_routing import routed_by, thread
from spectr.layers.names import take_names_of_base
from spectr.layers.routed_linear import RoutedLinear
from spectr.layers.saved_module import SavedModule
from spectr.lazy import lazy


class MultiRoutedLinear(nn.Module):
    """``y[t] = branch(t)(x[t])``: one base layer, whose experts' update is made by each token's own branch.

    Tokens are the last axis but one. The branches belong to models of their own, and are no part of this one.

    Args:
        base: The layer as it was; never changed.
        branches: What the routers have made of it, in the order of their numbers. The thread's spans
            (:class:`spectr.layers.batch_routing.Span`) decide which of them computes a token; without spans, the first.
    """

    def __init__(self, base: nn.Module, branches: Sequence[RoutedLinear]):
        super().__init__()
        self.base, self.branches = base, tuple(branches)
        take_names_of_base(self)
        self.train(base.training)

    def forward(self, input: Float[Tensor, "*B T I"], *args: Any, **kwargs: Any) -> Float[Tensor, "*B T O"]:
        """The base layer's output, computed once, and each token's update; of one branch alone, what that one gives."""
        spans = thread.spans
        if not spans:
            return self.branches[0](input, *args, **kwargs)
        if len(spans) == 1:
            with routed_by(spans[0].routing):
                return self.branches[spans[0].branch](input, *args, **kwargs)
        out = self.base(input, *args, **kwargs)
        for branch, tokens, routing in spans:
            with routed_by(routing):
                out[..., tokens, :] = self.branches[branch].update(out[..., tokens, :], input[..., tokens, :])
        return out

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base.bias  # pyright: ignore[reportReturnType]


__getattr__ = lazy(__name__, {}, renamed={"Fork": "MultiRoutedLinear"})


COMPOSED = (RoutedLinear, SavedModule, MultiRoutedLinear)  # what a composed model contains
