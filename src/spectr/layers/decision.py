"""What a routed layer has decided, and what it knows of the factors that are in force."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from spectr.layers.kernels import Choice, Kernels, Whole


class Decision(NamedTuple):
    """One module's routing of one call: ``h = A x``, float32 scores, and weights (zero where not chosen)."""

    h_TP: Float[Tensor, "*T P"]
    scores_TE: Float[Tensor, "*T E"]
    weights_TE: Float[Tensor, "*T E"]


class Held(NamedTuple):
    """A decision that holds until the next prompt: the stack of the experts that take part, and their weights."""

    A_PI: Float[Tensor, "P I"]
    B_OP: Float[Tensor, "O P"]
    owner_P: Int[Tensor, " P"]
    weights_B1E: Float[Tensor, "B 1 E"]
    weights_B1P: Float[Tensor, "B 1 P"]
    all_weights_B1E: Float[Tensor, "B 1 F"]


class Fusable(NamedTuple):
    """Factors that kernels have looked at, so that a call need not.

    Attributes:
        able: Whether they can work on them, and the router and the combination are theirs.
        choice: Of a layer that is routed.
        whole: The base layer and its experts in one call, where there is one.
    """

    kernels: Kernels
    A_PI: Float[Tensor, "P I"]
    B_OP: Float[Tensor, "O P"]
    Bt_PO: Float[Tensor, "P O"]
    able: bool
    choice: Choice
    whole: Whole | None
