"""Mu-routing: every expert, always."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.routers.settings import check_settings
from spectr.spectral import Aligned, Prepared


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """All experts that adapt a module, each with weight ``1 / E``.

    Attributes:
        combine: ``"outputs"``, or another of :data:`spectr.combine.COMBINATIONS`.

    Source: mu-routing (Ostapenko et al., 2024).
    """

    combine: str = "outputs"

    def __post_init__(self) -> None:
        check_settings(self)

    def prepare(self, aligned: Aligned) -> Prepared:
        """See :class:`Router`."""
        return Prepared.spectral(aligned)

    def scores(
        self, x_TI: Float[Tensor, "*T I"], norms_TE: Float[Tensor, "*T E"], prototypes_EI: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`; all ones."""
        return torch.ones_like(norms_TE)
