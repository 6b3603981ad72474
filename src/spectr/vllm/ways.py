"""Routers that have like factors, so that by those of one all score: ``A x``, row by row scaled, from a centre."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.routers import Arrow, Calibrated, Router, Seqr, Spectr, Uniform
from spectr.spectral import Stack

KIN = (Spectr, Seqr, Calibrated, Arrow, Uniform)  # their factors are S V^T and U, up to a scale of each row


class Way(NamedTuple):
    """How a router scores the experts of one module: ``||scales A x - centers||`` of each one's rows.

    Attributes:
        centers_P: Float32.
        scales_P: Likewise.
    """

    centers_P: Float[Tensor, " P"]
    scales_P: Float[Tensor, " P"]

    @staticmethod
    def of(own: Stack, held: Stack, router: Router) -> Way:
        """A router's scores by the factors that are held.

        Args:
            own: The module's experts as the router prepares them.
            held: The same as another of its kin does.
            router: One of :data:`KIN`.
        """
        A_PI, centers_P = own.A_PI, own.centers_P
        firsts = torch.tensor((0, *own.ranks[:-1])).cumsum(0)
        if centers_P is None:
            centers_P = torch.zeros(len(A_PI))
        if isinstance(router, (Arrow, Uniform)):
            A_PI = torch.zeros_like(A_PI)
        if isinstance(router, Arrow):
            assert own.prototypes_EI is not None
            A_PI[firsts] = own.prototypes_EI
        if isinstance(router, Uniform):
            centers_P = centers_P.index_fill(0, firsts, 1.0)  # all score one
        length_P = held.A_PI.norm(dim=1)
        return Way(centers_P, A_PI.norm(dim=1) / length_P.where(length_P > 0, 1))


def by_ways(routers: Sequence[Router]) -> bool:
    """Whether the layers score in ways, and not as the one router that there is does."""
    return len(routers) > 1 or isinstance(routers[0], (Arrow, Uniform))
