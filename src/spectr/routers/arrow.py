"""Arrow: an expert's score is the token's component along its first singular direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from spectr.routers.router import LengthRouter, Lengths
from spectr.routers.setting_checks import first_rows
from spectr.selection import TopK, Weighting
from spectr.spectral import AlignedExpert, InputState, Share, SideData, State


class Prototypes(NamedTuple):
    """Each expert's ``v_t``."""

    prototypes_EI: Float[Tensor, "E I"]


@dataclass(frozen=True, kw_only=True)
class Arrow(LengthRouter):
    """Arrow routing: ``|v_t . x|`` with the first right singular vector ``v_t`` of ``delta_t``; softmax of the top k.

    Attributes:
        top_k: Experts per token and layer.
        weights: ``"softmax"`` of the chosen scores, or ``"uniform"``.
        temperature: Temperature of the softmax.
        combine: ``"outputs"``, or another name in :data:`spectr.combine.COMBINATIONS`.

    Source: Arrow (Ostapenko et al., 2024); SpectR eq. 4 and 5.
    """

    reads, rule = "x", ""

    top_k: int = 4
    weights: Weighting = "softmax"
    temperature: float = 1.0
    combine: str = "outputs"

    @property
    def selection(self) -> TopK:
        """See :class:`Router`."""
        return TopK(k=self.top_k, weighting=self.weights, temperature=self.temperature)

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`: the prototype is ``v_t``."""
        return Share.spectral(expert.aligned)._replace(own=Prototypes(expert.aligned.Vh[:1]))

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Tensor, allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: ``|v_t . x|``."""
        return linear(x_TI, state.own.prototypes_EI).float().abs()

    def lengths(self, state: InputState) -> Lengths:
        """See :class:`LengthRouter`: an expert's first row is ``v_t``, the others are zero."""
        A_PI = torch.zeros_like(state.A_PI)
        A_PI[first_rows(state.ranks)] = state.own.prototypes_EI
        return Lengths(A_PI)
