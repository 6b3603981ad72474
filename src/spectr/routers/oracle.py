"""The oracle: one expert that someone else chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError, did_you_mean
from spectr.spectral import Aligned, Prepared


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Always the named expert with weight 1: the fine-tuned model itself. The other experts are not even loaded.

    Attributes:
        expert: Its name.
    """

    expert: str

    def resident(self, experts: Sequence[str]) -> tuple[str, ...]:
        """See :class:`Router`."""
        if self.expert not in experts:
            raise CompositionError(
                f"the oracle's expert '{self.expert}' is not there", do=did_you_mean(self.expert, experts)
            )
        return (self.expert,)

    def prepare(self, aligned: Aligned) -> Prepared:
        """See :class:`Router`."""
        return Prepared.spectral(aligned)

    def scores(
        self, x_TI: Float[Tensor, "*T I"], norms_TE: Float[Tensor, "*T E"], prototypes_EI: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`; all ones."""
        return torch.ones_like(norms_TE)
