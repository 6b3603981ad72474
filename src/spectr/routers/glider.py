"""GLIDER: what an expert's description says of the whole prompt, added to what a local router says of each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.library.needs import DESCRIBED, SIDE_DATA, Need
from spectr.routers.base import GuidedRouter, Router, ShortlistRouter
from spectr.routers.phatgoose import Phatgoose
from spectr.routers.settings import check_settings
from spectr.routers.use import HoldWeights, InformScores, Use
from spectr.selection import TopK, Weighting
from spectr.spectral import AlignedExpert, InputState, Share, SideData, Stack, State


@dataclass(frozen=True, kw_only=True)
class Glider(GuidedRouter):
    """``s_t(x) + alpha cos(e_t, q)``, softmax of the top k.

    ``e_t`` embeds an instruction that describes expert ``t``'s task, ``q`` the instruction that a language model
    writes for the prompt (:class:`spectr.guidance.Guide`): one vector for all layers and tokens.

    Attributes:
        local: Says ``s_t(x)``: any router that scores token by token. ``None`` for global routing alone, which is
            decided once for the prompt and held.
        alpha: ``"gated"``: ``alpha_near`` where ``max_t cos(e_t, q)`` is above ``threshold``, as for a task that
            some expert knows, and ``alpha_far`` elsewhere. Or one number for all prompts.
        alpha_near: See ``alpha``.
        alpha_far: See ``alpha``.
        threshold: See ``alpha``.
        top_k: Experts for each token and module.
        weights: ``"softmax"`` of the chosen scores, or ``"uniform"``.
        temperature: Of the softmax.
        combine: ``"outputs"``, or another of :data:`spectr.combine.COMBINATIONS`.

    Source: GLIDER (Li et al., 2024). Their released code sets one alpha by hand.
    """

    reads = "xh"

    local: Router | None = field(default_factory=Phatgoose)
    alpha: float | Literal["gated"] = "gated"
    alpha_near: float = 100.0
    alpha_far: float = 3.0
    threshold: float = 0.8
    top_k: int = 2
    weights: Weighting = "softmax"
    temperature: float = 1.0
    combine: str = "outputs"

    def __post_init__(self) -> None:
        check_settings(self)
        if isinstance(self.alpha, str) and self.alpha != "gated":
            raise CompositionError(f"alpha={self.alpha!r}", expected="a number, or 'gated'")
        if self.local is not None and (self.local.use is not None or isinstance(self.local, ShortlistRouter)):
            raise CompositionError(
                f"local={self.local}", expected="a router that scores every expert for each token, or None"
            )

    @property
    def selection(self) -> TopK:
        """See :class:`Router`."""
        return TopK(k=self.top_k, weighting=self.weights, temperature=self.temperature)

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`: descriptions, and what the local router reads of a library."""
        local = () if self.local is None else self.local.needs
        return (*super().needs, *(need for need in local if need in SIDE_DATA), DESCRIBED)

    @property
    def use(self) -> Use:
        """See :class:`Router`."""
        return HoldWeights() if self.local is None else InformScores()

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`: the local router's share."""
        return Share.spectral(expert.aligned) if self.local is None else self.local.init_expert(expert, side)

    def stack(self, shares: Mapping[str, Share]) -> Stack:
        """See :class:`Router`: as the local router."""
        return super().stack(shares) if self.local is None else self.local.stack(shares)

    def shares(self, stack: Stack) -> Mapping[str, Share]:
        """See :class:`Router`: as the local router."""
        return super().shares(stack) if self.local is None else self.local.shares(stack)

    def inputs(self, state: InputState, x_TI: Float[Tensor, "*T I"]) -> Float[Tensor, "*T P"]:
        """See :class:`Router`: as the local router."""
        return super().inputs(state, x_TI) if self.local is None else self.local.inputs(state, x_TI)

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Float[Tensor, "*T P"], allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: the local part."""
        if self.local is None:
            dtype = torch.promote_types(x_TI.dtype, torch.float32)
            return x_TI.new_zeros(*x_TI.shape[:-1], len(state.ranks), dtype=dtype)
        return self.local.scores(state, x_TI, h_TP, allowed_TE)

    def verdict(self, evidence_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """See :class:`PromptRouter`: from cosines to ``alpha cos``, or to the weights of global routing alone."""
        if isinstance(self.alpha, str):
            near_B1 = evidence_BE.amax(-1, keepdim=True) > self.threshold
            global_BE = torch.where(near_B1, self.alpha_near, self.alpha_far) * evidence_BE
        else:
            global_BE = self.alpha * evidence_BE
        return self.selection(global_BE) if self.local is None else global_BE

    def informed(self, scores_TE: Float[Tensor, "*T E"], prior_B1E: Float[Tensor, "B _ E"]) -> Float[Tensor, "*T E"]:
        """See :class:`PromptRouter`: their sum."""
        return scores_TE + prior_B1E
