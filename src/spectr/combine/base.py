"""What a combination is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Combination(NamedTuple):
    """How the chosen experts' updates become one.

    Attributes:
        merge: ``(h_TP, weights_TE, B_OP, owner_P) -> delta_TO``, pure, with ``h = A x`` of all experts.
        density: Share of the entries of an expert's output factor that stay when it is prepared; see
            :func:`spectr.spectral.sparsify.drop`.
    """

    merge: Callable[..., Tensor]
    density: float = 1.0
