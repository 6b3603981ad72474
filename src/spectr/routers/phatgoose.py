"""PHATGOOSE: an expert's score is what its trained gate says of the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from spectr.routers.settings import check_settings
from spectr.selection import Weighting
from spectr.spectral import Aligned, Prepared


@dataclass(frozen=True, kw_only=True)
class Phatgoose:
    """``LN(x) . LN(v_t) / sqrt(I)`` with the gates ``v_t`` that ``spectr train gates`` trained; softmax of the top k.

    LayerNorm is without affine. The softmax over the chosen is that over all experts, renormalised.

    Attributes:
        top_k: Experts for each token and module.
        weights: ``"softmax"`` of the chosen scores, or ``"uniform"``.
        temperature: Of the softmax.
        combine: ``"outputs"``, or another of :data:`spectr.combine.COMBINATIONS`.

    Source: PHATGOOSE (Muqeeth et al., 2024), section 3.
    """

    gated: ClassVar[bool] = True

    top_k: int = 2
    weights: Weighting = "softmax"
    temperature: float = 1.0
    combine: str = "outputs"

    def __post_init__(self) -> None:
        check_settings(self)

    def prepare(self, aligned: Aligned) -> Prepared:
        """See :class:`Router`."""
        return Prepared.spectral(aligned)

    def scores(
        self, x_TI: Float[Tensor, "*T I"], norms_TE: Float[Tensor, "*T E"], prototypes_EI: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`; the prototypes are the gates after their LayerNorm."""
        assert prototypes_EI is not None
        inputs = x_TI.shape[-1]
        normed_TI = layer_norm(x_TI.float(), (inputs,))
        return linear(normed_TI, prototypes_EI.float()) / inputs**0.5
