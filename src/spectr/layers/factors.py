"""The experts of one layer as its calls need them."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from spectr.layers.kernels import Choice, Kernels, Whole


class KernelPlan(NamedTuple):
    """What kernels know of factors that they have looked at, so that a call need not.

    Attributes:
        choice: How tokens choose, where they do.
        whole: The base layer and its experts in one call, where there is one.
    """

    kernels: Kernels
    Bt_PO: Float[Tensor, "P O"]
    choice: Choice
    whole: Whole | None


class Factors(NamedTuple):
    """Experts of one layer, on its device and in its dtype. Never changed.

    Attributes:
        experts: Their names, in the order of the E axis.
        ranks: Their ranks; the P axis has their sum.
        common_rank: The rank of all, ``None`` where they differ.
        A_PI: Input factors; of experts that share theirs, that one.
        B_OP: Output factors; an expert's columns lie together in memory.
        owner_P: For each row the number of its expert.
        member_EP: One where row ``p`` belongs to expert ``e``, else zero.
        rows_ER: Each expert's rows, where only those of the chosen ones are read.
        prototypes_EI: One vector an expert, where scores come from those.
        centers_P: Subtracted from ``A x`` before it is scored.
        mix_PR: Makes the experts' input factors of a shared one.
        C_QP: What the combination made of the output factors, in their place.
        U_OQ: And what it needs with that.
        plan: What kernels know of them; ``None``: torch computes.
    """

    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    common_rank: int | None
    A_PI: Float[Tensor, "_ I"]
    B_OP: Float[Tensor, "O P"]
    owner_P: Int[Tensor, " P"]
    member_EP: Float[Tensor, "E P"]
    rows_ER: Int[Tensor, "E R"] | None = None
    prototypes_EI: Float[Tensor, "E I"] | None = None
    centers_P: Float[Tensor, " P"] | None = None
    mix_PR: Float[Tensor, "P Q"] | None = None
    C_QP: Float[Tensor, "Q P"] | None = None
    U_OQ: Float[Tensor, "O Q"] | None = None
    plan: KernelPlan | None = None


class Decision(NamedTuple):
    """One module's routing of one call: ``h = A x``, float32 scores, and weights (zero where not chosen)."""

    h_TP: Float[Tensor, "*T P"]
    scores_TE: Float[Tensor, "*T E"]
    weights_TE: Float[Tensor, "*T E"]
