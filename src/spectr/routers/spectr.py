"""SpectR: an expert's score is the length of its low-rank vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from spectr.routers.router import LengthRouter, Lengths
from spectr.routers.setting_checks import check_settings
from spectr.selection import TopK, Weighting
from spectr.spectral import AlignedExpert, InputState, Share, SideData, State, segment_norms


@dataclass(frozen=True, kw_only=True)
class Spectr(LengthRouter):
    """Spectral routing: the ``top_k`` experts with the longest ``A*_t x``.

    Attributes:
        score: ``"spectral"``, as in the paper: ``A* = S V^T``, so that the score is ``||delta_t x||``.
            ``"projection"``, as in the authors' released code: ``A* = V^T`` and ``B* = U S``, so that the score is the
            length of the projection on the expert's input subspace.
        top_k: Experts per token and layer.
        weights: ``"uniform"`` (``1 / k``) or ``"softmax"`` of the chosen scores.
        temperature: Temperature of the softmax.
        combine: ``"outputs"`` (eq. 13), ``"factors"`` (eq. 10 to 12, the paper's experiments), or another name in
            :data:`spectr.combine.COMBINATIONS`.

    Source: SpectR (Fleshman and Van Durme, 2025), eq. 2 to 13.
    """

    score: Literal["spectral", "projection"] = "spectral"
    top_k: int = 4
    weights: Weighting = "uniform"
    temperature: float = 1.0
    combine: str = "outputs"

    def __post_init__(self) -> None:
        check_settings(self, score=(self.score, ("spectral", "projection")))

    @property
    def selection(self) -> TopK:
        """See :class:`Router`."""
        return TopK(k=self.top_k, weighting=self.weights, temperature=self.temperature)

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`: ``A*`` and ``B*``."""
        if self.score == "projection":
            U, S, Vh = expert.aligned
            return Share(Vh, U * S)
        return super().init_expert(expert, side)

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Float[Tensor, "*T P"], allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: ``||h_t||``, eq. 8."""
        return segment_norms(h_TP, state)

    def lengths(self, state: InputState) -> Lengths:
        """See :class:`LengthRouter`."""
        return Lengths(state.A_PI)
