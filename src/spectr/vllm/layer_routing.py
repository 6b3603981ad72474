"""Scores and weights of a packed layer: pure torch, static shapes, any number of requests in a batch.

Legend: T tokens, S modules of one layer with the same experts and ranks, E experts, P rows of their factors,
R one expert's rows, W token routers, F the engine's experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from spectr.combine import merge_factors, merged_products
from spectr.routers import LengthRouter, Router
from spectr.selection import select_among
from spectr.spectral import Stack, remade, segment_norms


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


def sees_input(router: Router) -> bool:
    """Whether a router's scores need a module's whole input, not only products with it."""
    return "x" in router.reads and not isinstance(router, LengthRouter)


class Group(nn.Module):
    """Adjacent modules of one packed layer that have the same experts with the same ranks.

    A router's ``scores`` read it; see :class:`spectr.spectral.State`.

    Args:
        stacks: Each module's experts, as the first router prepared them.
        routers: The token routers. If there are several, each token names its own.
        columns: The numbers of these experts in the engine.
        engine_experts: The engine's number of experts.
        most_fixed: Maximum number of experts with fixed weights.
        transforms: Each router's score transform for each module, if :func:`needs_transforms`.
    """

    owner_P: Tensor
    member_EP: Tensor
    columns_E: Tensor
    centers_SWP: Tensor | None
    scales_SWP: Tensor | None

    def __init__(
        self,
        stacks: Sequence[Stack],
        routers: Sequence[Router],
        columns: Sequence[int],
        engine_experts: int,
        most_fixed: int = 0,
        transforms: Sequence[Sequence[ScoreTransform]] = (),
    ):
        super().__init__()
        first, router = stacks[0], routers[0]
        self.modules_S, self.experts, self.common_rank = len(stacks), len(first.experts), first.common_rank
        self.ranks = first.ranks
        self.rows = len(first.A_PI)
        self.router, self.selects = router, [one.selection for one in routers]
        self.merges = router.combination.merge is merge_factors
        self.most_fixed = most_fixed
        uses = [one.policy.use for one in routers if one.policy is not None]
        priors = [use for use in uses if not use.fixes]
        self.informed = priors[0].informed if priors else None
        self.holds_all = list(columns) == list(range(engine_experts))
        centers_SWP, scales_SWP = _tables(stacks, transforms, router)
        buffers: dict[str, Tensor | None] = {
            "owner_P": first.owner_P,
            "member_EP": first.member_EP.float(),
            "columns_E": torch.tensor(columns),
            "centers_SWP": centers_SWP,
            "scales_SWP": scales_SWP,
        }
        own = _own(stacks) if scales_SWP is None or router.reads == "h" else ()
        self._state, self._own = type(own), [f"own_{number}" for number in range(len(own))]
        buffers |= dict(zip(self._own, own, strict=True))
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def own(self) -> tuple[Tensor, ...]:
        """The first router's own tensors, for one module or stacked along S."""
        return self._state(*(getattr(self, name) for name in self._own)) if self._own else ()

    def refill(self, stacks: Sequence[Stack], transforms: Sequence[Sequence[ScoreTransform]] = ()) -> None:
        """Write the centers, scales and prototypes of these stacks into the buffers."""
        for here, table in zip(
            (self.centers_SWP, self.scales_SWP), _tables(stacks, transforms, self.router), strict=True
        ):
            if here is not None and table is not None:
                here.copy_(table)
        for here, tensor in zip(self.own, _own(stacks), strict=False):
            here.copy_(tensor)

    def choose(
        self,
        h_TSP: Float[Tensor, "T S P"],
        x_TI: Tensor,
        routing_TF: Float[Tensor, "T F"],
        router_T: Int32[Tensor, " T"],
    ) -> tuple[Float[Tensor, "T S E"], Float[Tensor, "T S E"]]:
        """Scores and weights of each token and module.

        Args:
            h_TSP: ``A x``.
            x_TI: The input. In a row-parallel layer it is a part, and the router does not read it.
            routing_TF: How each token may use the engine's experts; see :attr:`WorkerState.routing_TE`.
            router_T: The number of each token's router, if there are several.
        """
        scores_TSE = self.scores(h_TSP, x_TI) if self.scales_SWP is None else self._transformed_scores(h_TSP, router_T)
        routing_TE = routing_TF if self.holds_all else routing_TF[:, self.columns_E]
        routing_TSE = routing_TE[:, None].expand_as(scores_TSE)
        allowed_TSE = routing_TSE >= 0
        if self.informed is not None:
            scores_TSE = self.informed(scores_TSE, routing_TSE).where(allowed_TSE, scores_TSE)
        weights_TSE = select_among(self.selects[0], scores_TSE, allowed_TSE)
        for number, select in enumerate(self.selects[1:], start=1):
            others_TSE = select_among(select, scores_TSE, allowed_TSE)
            weights_TSE = others_TSE.where((router_T == number)[:, None, None], weights_TSE)
        if self.most_fixed:
            weights_TSE = (-routing_TSE).where(routing_TSE < 0, weights_TSE)
        return scores_TSE, weights_TSE

    def scores(self, h_TSP: Float[Tensor, "T S P"], x_TI: Tensor) -> Float[Tensor, "T S E"]:
        """The first router's scores alone; see :meth:`choose`."""
        return self.router.scores(self, x_TI[:, None].expand(-1, self.modules_S, -1), h_TSP, None)

    def _transformed_scores(
        self, h_TSP: Float[Tensor, "T S P"], router_T: Int32[Tensor, " T"]
    ) -> Float[Tensor, "T S E"]:
        assert self.centers_SWP is not None
        assert self.scales_SWP is not None
        centers_TSP, scales_TSP = (table[:, router_T].movedim(0, 1) for table in (self.centers_SWP, self.scales_SWP))
        return segment_norms(h_TSP * scales_TSP - centers_TSP, self)

    def weighted(self, h_TSP: Float[Tensor, "T S P"], weights_TSE: Float[Tensor, "T S E"]) -> Float[Tensor, "T S P"]:
        """``h`` times its weights: zero where the weight is zero, even if ``h`` is not finite."""
        weights_TSP = weights_TSE[..., self.owner_P].to(h_TSP.dtype)
        h_TSP = h_TSP.where(weights_TSP != 0, 0)
        return merged_products(h_TSP, weights_TSE) if self.merges else h_TSP * weights_TSP


def _own(stacks: Sequence[Stack]) -> tuple[Tensor, ...]:
    """The router's own tensors for modules that are scored together."""
    if len(stacks) == 1:
        return stacks[0].own
    return remade(stacks[0].own, [torch.stack(each) for each in zip(*(stack.own for stack in stacks), strict=True)])


def _tables(
    stacks: Sequence[Stack], transforms: Sequence[Sequence[ScoreTransform]], router: Router
) -> tuple[Tensor | None, Tensor | None]:
    """Centers and scales, (S, W, P), if there are any."""
    if not any(transforms):
        rows = [router.lengths(stack).centers_P for stack in stacks] if isinstance(router, LengthRouter) else []
        centers = [row[None] for row in rows if row is not None]
        return torch.stack(centers) if centers else None, None
    tables = [[torch.stack(rows) for rows in zip(*module, strict=True)] for module in transforms]
    centers, scales = zip(*tables, strict=True)
    return torch.stack(centers), torch.stack(scales)


def same_layout(one: Any, other: Any, router: Router) -> bool:
    """Whether two stacks can be scored together."""
    loose = isinstance(router, LengthRouter) or not (one.own or other.own)
    same = (one.experts, one.ranks) == (other.experts, other.ranks)
    return loose and same and one.common_rank is not None
