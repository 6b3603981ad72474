"""Mu-routing: always use every expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.routers.router import LengthRouter, Lengths
from spectr.routers.setting_checks import first_rows
from spectr.selection import All
from spectr.spectral import InputState, State


@dataclass(frozen=True, kw_only=True)
class Uniform(LengthRouter):
    """All experts that adapt a layer, each with weight ``1 / E``.

    Attributes:
        combine: ``"outputs"``, or another name in :data:`spectr.combine.COMBINATIONS`.

    Source: mu-routing (Ostapenko et al., 2024).
    """

    reads, rule = "", ""

    combine: str = "outputs"

    @property
    def selection(self) -> All:
        """See :class:`Router`."""
        return All()

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Tensor, allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: all ones."""
        dtype = torch.promote_types(x_TI.dtype, torch.float32)
        return x_TI.new_ones(*x_TI.shape[:-1], len(state.ranks), dtype=dtype)

    def lengths(self, state: InputState) -> Lengths:
        """See :class:`LengthRouter`: rows of zeros, at distance one from each center."""
        centers_P = state.A_PI.new_zeros(len(state.A_PI)).index_fill(0, first_rows(state.ranks), 1.0)
        return Lengths(torch.zeros_like(state.A_PI), centers_P)
