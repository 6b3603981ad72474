"""GLIDER: what an expert's description says of the whole prompt, added to what a local router says of each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.routers.base import PromptRouter, Router, ShortlistRouter
from spectr.routers.phatgoose import Phatgoose
from spectr.routers.settings import check_settings, selection_of
from spectr.selection import Weighting
from spectr.spectral import Aligned, Prepared


@dataclass(frozen=True, kw_only=True)
class Glider:
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

    guided: ClassVar[bool] = True

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
        by_prompt = isinstance(self.local, PromptRouter) and self.local.level != "token"
        if by_prompt or isinstance(self.local, ShortlistRouter):
            raise CompositionError(
                f"local={self.local}", expected="a router that scores every expert for each token, or None"
            )

    @property
    def gated(self) -> bool:
        """See :class:`Router`: as the local router."""
        return getattr(self.local, "gated", False)

    @property
    def calibrated(self) -> bool:
        """See :class:`Router`: as the local router."""
        return getattr(self.local, "calibrated", False)

    @property
    def shares_A(self) -> bool:
        """See :class:`Router`: as the local router."""
        return getattr(self.local, "shares_A", False)

    @property
    def level(self) -> str:
        """See :class:`PromptRouter`."""
        return "prompt" if self.local is None else "prior"

    def prepare(self, aligned: Aligned) -> Prepared:
        """See :class:`Router`."""
        return Prepared.spectral(aligned) if self.local is None else self.local.prepare(aligned)

    def scores(
        self, x_TI: Float[Tensor, "*T I"], norms_TE: Float[Tensor, "*T E"], prototypes_EI: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: the local part."""
        if self.local is None:
            return torch.zeros_like(norms_TE)
        return self.local.scores(x_TI, norms_TE, prototypes_EI)

    def verdict(self, evidence_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """See :class:`PromptRouter`: from cosines to ``alpha cos``, or to the weights of global routing alone."""
        if isinstance(self.alpha, str):
            near_B1 = evidence_BE.amax(-1, keepdim=True) > self.threshold
            global_BE = torch.where(near_B1, self.alpha_near, self.alpha_far) * evidence_BE
        else:
            global_BE = self.alpha * evidence_BE
        return selection_of(self)(global_BE) if self.local is None else global_BE

    def informed(self, scores_TE: Float[Tensor, "*T E"], prior_B1E: Float[Tensor, "B _ E"]) -> Float[Tensor, "*T E"]:
        """See :class:`PromptRouter`: their sum."""
        return scores_TE + prior_B1E
