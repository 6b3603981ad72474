"""Routers whose factors differ only by a scale for each row: all of them score by one router's products ``A x``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.routers import LengthRouter, Router
from spectr.spectral import Stack


class ScoreTransform(NamedTuple):
    """How a router scores the experts of one module: ``||scales A x - centers||`` over each expert's rows.

    Attributes:
        centers_P: Float32.
        scales_P: Float32.
    """

    centers_P: Float[Tensor, " P"]
    scales_P: Float[Tensor, " P"]

    @staticmethod
    def of(own: Stack, shared: Stack, router: LengthRouter) -> ScoreTransform:
        """The transform of a shared router's products ``A x``.

        Args:
            own: The module's experts as the router prepares them.
            shared: The same experts, as the router with the computed products prepares them.
            router: The router that scores.
        """
        A_PI, centers_P = router.lengths(own)
        centers_P = torch.zeros(len(A_PI), dtype=torch.float32) if centers_P is None else centers_P
        length_P = shared.A_PI.norm(dim=1)
        return ScoreTransform(centers_P, A_PI.norm(dim=1) / length_P.where(length_P > 0, 1))


def needs_transforms(routers: Sequence[Router]) -> bool:
    """Whether scores are transforms of ``A x``: with several routers, or if scores are not norms of ``A x``."""
    return len(routers) > 1 or (isinstance(routers[0], LengthRouter) and routers[0].reads != "h")
