"""SEQR with the authors' normalisation: each expert's score in standard deviations from its own mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from spectr.library.needs import NORMED, Need
from spectr.routers.router import Router
from spectr.routers.seqr import Seqr
from spectr.selection import TopK, Weighting
from spectr.spectral import AlignedExpert, InputState, Share, SideData, Stack, State, segment_norms

_SEQR = Seqr()
_LEAST = 1e-3  # least deviation, as a share of the mean; 0.07 is the least of the shipped experts
_LAST = 1e4  # deviations below zero of an expert that comes last; a float16 has it


class Norms(NamedTuple):
    """Mean and deviation of each expert's ``||delta_t x||``."""

    means_E: Float[Tensor, " E"]
    deviations_E: Float[Tensor, " E"]


@dataclass(frozen=True, kw_only=True)
class SeqrNormalised(Router):
    """``(||delta_t x|| - mean_t) / deviation_t``: the score of :class:`Seqr`, so that an expert's size does not count.

    The library's calibration has both numbers for each expert and module. They are of texts that the base model wrote,
    or of the expert's own training rows, as the authors have them (``spectr library calibrate --own-rows``). An expert
    whose score does not vary on them, or at a module that no text reaches, comes last: nothing is known of its size.

    Attributes:
        top_k: Experts per token and layer.
        weights: ``"uniform"`` (``1 / k``) or ``"softmax"`` of the chosen scores.
        temperature: Temperature of the softmax.
        combine: ``"outputs"``, or another name in :data:`spectr.combine.COMBINATIONS`.

    Source: SEQR (Fleshman and Van Durme, 2025).
    """

    signed = True

    top_k: int = 1
    weights: Weighting = "uniform"
    temperature: float = 1.0
    combine: str = "outputs"

    @property
    def selection(self) -> TopK:
        """See :class:`Router`."""
        return TopK(k=self.top_k, weighting=self.weights, temperature=self.temperature)

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`."""
        return (*super().needs, NORMED)

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`: SEQR's share, with mean and deviation."""
        share = _SEQR.init_expert(expert, side)
        mean, deviation = side.norm or (0.0, 0.0)
        if deviation <= _LEAST * mean:  # also 0 of 0
            mean, deviation = _LAST, 1.0
        return share._replace(own=Norms(share.A.new_tensor([mean]), share.A.new_tensor([deviation])))

    def stack(self, shares: Mapping[str, Share]) -> Stack:
        """See :class:`Router`: as :class:`Seqr`."""
        return _SEQR.stack(shares)

    def shares(self, stack: Stack) -> Mapping[str, Share]:
        """See :class:`Router`: as :class:`Seqr`."""
        return _SEQR.shares(stack)

    def inputs(self, state: InputState, x_TI: Float[Tensor, "*T I"]) -> Float[Tensor, "*T P"]:
        """See :class:`Router`: as :class:`Seqr`."""
        return _SEQR.inputs(state, x_TI)

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Float[Tensor, "*T P"], allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`."""
        return (segment_norms(h_TP, state) - state.own.means_E) / state.own.deviations_E
