"""Arrow: an expert's score is the token's component along its first singular direction."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from spectr.routers.settings import check_settings
from spectr.selection import Weighting
from spectr.spectral import Aligned, Prepared


@dataclass(frozen=True, kw_only=True)
class Arrow:
    """Arrow routing: ``|v_t . x|`` with the top right singular vector ``v_t`` of ``delta_t``, softmax of the top k.

    Attributes:
        top_k: Experts for each token and module.
        weights: ``"softmax"`` of the chosen scores, or ``"uniform"``.
        temperature: Of the softmax.
        combine: ``"outputs"``, or another of :data:`spectr.combine.COMBINATIONS`.

    Source: Arrow (Ostapenko et al., 2024); SpectR eq. 4 and 5.
    """

    top_k: int = 4
    weights: Weighting = "softmax"
    temperature: float = 1.0
    combine: str = "outputs"

    def __post_init__(self) -> None:
        check_settings(self)

    def prepare(self, aligned: Aligned) -> Prepared:
        """See :class:`Router`."""
        return Prepared.spectral(aligned)._replace(prototype=aligned.Vh[0])

    def scores(
        self, x_TI: Float[Tensor, "*T I"], norms_TE: Float[Tensor, "*T E"], prototypes_EI: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`."""
        assert prototypes_EI is not None
        return linear(x_TI, prototypes_EI).float().abs()
