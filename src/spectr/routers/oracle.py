"""The oracle: one expert that the user chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.library.needs import Need, OneExpert
from spectr.routers.router import Router
from spectr.selection import All
from spectr.spectral import Share, Stack, State


@dataclass(frozen=True, kw_only=True)
class Oracle(Router):
    """Always uses the named expert with weight 1, as a fine-tuned model would. Other experts are not loaded.

    Attributes:
        expert: Name of the expert.
    """

    reads = ""

    expert: str

    @property
    def selection(self) -> All:
        """See :class:`Router`."""
        return All()

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`: this expert only."""
        return (OneExpert(self.expert),)

    def stack(self, shares: Mapping[str, Share]) -> Stack:
        """See :class:`Router`: the named expert only."""
        return Stack.of({self.expert: shares[self.expert]})

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Tensor, allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: always one."""
        return x_TI.new_ones(*x_TI.shape[:-1], 1, dtype=torch.promote_types(x_TI.dtype, torch.float32))
