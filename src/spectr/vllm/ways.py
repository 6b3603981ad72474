"""Several routers by one set of factors: each scores ``A x`` from a centre of its own, its rows scaled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.routers import Arrow, Calibrated, Router, Seqr, Spectr, Uniform
from spectr.spectral import Stack

KIN = (Spectr, Seqr, Calibrated, Arrow, Uniform)  # their factors are S V^T and U, up to a scale of each row


class Way(NamedTuple):
    """How a router scores the experts of one module: ``||scales (A x - centers)||`` of each one's rows.

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
        A_PI = torch.zeros_like(held.A_PI) if isinstance(router, (Arrow, Uniform)) else own.A_PI
        if isinstance(router, Arrow):  # the first row alone
            assert own.prototypes_EI is not None
            A_PI[torch.tensor((0, *own.ranks[:-1])).cumsum(0)] = own.prototypes_EI
        length_P = held.A_PI.norm(dim=1)
        scales_P = A_PI.norm(dim=1) / length_P.where(length_P > 0, 1)
        centers_P = torch.zeros_like(scales_P)
        if own.centers_P is not None:
            centers_P = own.centers_P / scales_P.where(scales_P > 0, 1)
        return Way(centers_P, scales_P)
