"""PHATGOOSE: an expert's score is the similarity of its trained gate to the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from spectr.library.needs import GATED, Need
from spectr.routers.router import Router
from spectr.selection import TopK, Weighting
from spectr.spectral import AlignedExpert, Share, SideData, State


class Gates(NamedTuple):
    """Each expert's ``LN(v_t)``."""

    gates_EI: Float[Tensor, "E I"]


@dataclass(frozen=True, kw_only=True)
class Phatgoose(Router):
    """``LN(x) . LN(v_t) / sqrt(I)`` with trained gates ``v_t`` (``spectr train gates``); softmax of the top k.

    LayerNorm has no affine part. The softmax over the chosen experts is the renormalised softmax over all.

    Attributes:
        top_k: Experts per token and layer.
        weights: ``"softmax"`` of the chosen scores, or ``"uniform"``.
        temperature: Temperature of the softmax.
        combine: ``"outputs"``, or another name in :data:`spectr.combine.COMBINATIONS`.

    Source: PHATGOOSE (Muqeeth et al., 2024), section 3.
    """

    reads, signed = "x", True

    top_k: int = 2
    weights: Weighting = "softmax"
    temperature: float = 1.0
    combine: str = "outputs"

    @property
    def selection(self) -> TopK:
        """See :class:`Router`."""
        return TopK(k=self.top_k, weighting=self.weights, temperature=self.temperature)

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`."""
        return (*super().needs, GATED)

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`: with ``LN(v_t)``."""
        assert side.gate_I is not None
        gate_I = layer_norm(side.gate_I.float(), side.gate_I.shape)
        return Share.spectral(expert.aligned)._replace(own=Gates(gate_I[None]))

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Tensor, allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: ``LN(x) . LN(v_t) / sqrt(I)``."""
        inputs = x_TI.shape[-1]
        normed_TI = layer_norm(x_TI.float(), (inputs,))
        return linear(normed_TI, state.own.gates_EI.float()) / inputs**0.5
