"""Routers that have like factors, so that by those of one all score: ``A x``, row by row scaled, from a centre."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.routers import LengthRouter, Router
from spectr.spectral import Stack


class Way(NamedTuple):
    """How a router scores the experts of one module: ``||scales A x - centers||`` of each one's rows.

    Attributes:
        centers_P: Float32.
        scales_P: Likewise.
    """

    centers_P: Float[Tensor, " P"]
    scales_P: Float[Tensor, " P"]

    @staticmethod
    def of(own: Stack, held: Stack, router: LengthRouter) -> Way:
        """A router's scores by the factors that are held.

        Args:
            own: The module's experts as the router prepares them.
            held: The same as another of its kin does.
            router: Whose way it is.
        """
        A_PI, centers_P = router.lengths(own)
        centers_P = torch.zeros(len(A_PI)) if centers_P is None else centers_P
        length_P = held.A_PI.norm(dim=1)
        return Way(centers_P, A_PI.norm(dim=1) / length_P.where(length_P > 0, 1))


def by_ways(routers: Sequence[Router]) -> bool:
    """Whether the layers score in ways: several routers do, and one whose scores are no lengths of its own products."""
    return len(routers) > 1 or (isinstance(routers[0], LengthRouter) and routers[0].reads != "h")
