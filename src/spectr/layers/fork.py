"""A linear layer that several routers have routed, each for its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from spectr.layers.names import take_names_of_base
from spectr.layers.routed import RoutedLinear


class Turn(NamedTuple):
    """Tokens of a call, and which branch computes them.

    Attributes:
        branch: Its number.
        tokens: Places along the token axis.
    """

    branch: int
    tokens: slice | Tensor


@dataclass
class Switch:
    """Says to all forks of a model whose tokens a call is made of.

    Attributes:
        turns: Every token is in one of them. A single turn has all tokens, however many they are.
    """

    turns: Sequence[Turn] = (Turn(0, slice(None)),)


class Fork(nn.Module):
    """``y[t] = branch(t)(x[t])``: one base layer, whose experts' update is made by each token's own branch.

    Tokens are the last axis but one. The branches belong to models of their own, and are no part of this one.

    Args:
        base: The layer as it was; never changed.
        branches: What the routers have made of it, in the order of their numbers.
        switch: Says which branch each token takes.
    """

    def __init__(self, base: nn.Module, branches: Sequence[RoutedLinear], switch: Switch):
        super().__init__()
        self.base, self.branches, self.switch = base, tuple(branches), switch
        take_names_of_base(self)
        self.train(base.training)

    def forward(self, input: Float[Tensor, "*B T I"], *args: Any, **kwargs: Any) -> Float[Tensor, "*B T O"]:
        """The base layer's output, computed once, and each token's update; of one branch alone, what that one gives."""
        turns = self.switch.turns
        if len(turns) == 1:
            return self.branches[turns[0].branch](input, *args, **kwargs)
        out = self.base(input, *args, **kwargs)
        for branch, tokens in turns:
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
