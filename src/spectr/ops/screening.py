"""Input factors in half the bytes, and what that leaves out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

PAYS = 8  # experts for each chosen one from which reading half of all ``A`` first is worth the memory that it takes
_UNIT = 2.0**-24  # by which one operation in float32 is off at most, relatively
_LANES = 8, 16  # sums that go side by side in a kernel; they, and what is left of the inputs, are summed up last


class Rough(NamedTuple):
    """The experts' ``A`` in bfloat16.

    Attributes:
        A_PI: To the nearest.
        errors_E: By how much of a token's length an expert's score by these differs at most from that by ``A`` in
            float32: ``||A_t - rough A_t||``, and what both sums round.
        sizes_E: By how much of the length of what is left out of a token it differs besides: ``||rough A_t||``.
        version: Of ``A`` when it was read.
    """

    A_PI: BFloat16[Tensor, "P I"]
    errors_E: Float[Tensor, " E"]
    sizes_E: Float[Tensor, " E"]
    version: int

    @classmethod
    def of(cls, A_PI: Float[Tensor, "P I"], experts: int) -> Rough | None:
        """Of experts of one rank; ``None`` of a tensor that does not tell when it is changed."""
        if A_PI.is_inference():
            return None
        rough_PI = A_PI.bfloat16()
        terms = A_PI.shape[1] / min(_LANES) + 3 * max(_LANES)
        rounding_E = 2 * terms * _UNIT * A_PI.unflatten(0, (experts, -1)).norm(dim=(1, 2))
        left_E, sizes_E = (_norms(factors_PI, experts) for factors_PI in (A_PI - rough_PI, rough_PI.float()))
        return cls(rough_PI, left_E + rounding_E, sizes_E, A_PI._version)


def _norms(A_PI: Float[Tensor, "P I"], experts: int) -> Float[Tensor, " E"]:
    """``||A_t||`` at least."""
    A_ERI = A_PI.unflatten(0, (experts, -1))
    largest_E = torch.bmm(A_ERI, A_ERI.mT).abs().sum(-1).amax(-1)  # no eigenvalue is beyond a row's sum
    return largest_E.sqrt() * (1 + 1e-3)
