"""GLIDER: adds the similarity of the prompt to an expert's description to another router's score of each token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.library.needs import SIDE_DATA, Need
from spectr.renamed import options_renamed
from spectr.routers.evidence.descriptions import DescriptionSimilarity
from spectr.routers.phatgoose import Phatgoose
from spectr.routers.policy import DelegatingRouter, PromptPolicy, PromptRouter
from spectr.routers.router import Router, ShortlistRouter
from spectr.routers.use import AddToScores, HoldWeights
from spectr.selection import All, TopK, Weighting
from spectr.spectral import State


@options_renamed(local="token_router")
@dataclass(frozen=True, kw_only=True)
class Glider(PromptRouter):
    """``s_t(x) + alpha cos(e_t, q)``, softmax of the top k.

    ``e_t`` embeds an instruction that describes expert ``t``'s task, and ``q`` the instruction that a language model
    writes for the prompt (:class:`spectr.composition.Guide`). The similarity is one number per expert, the
    same for all layers and tokens.

    Attributes:
        token_router: Computes ``s_t(x)``: any router that scores every expert for each token. ``None`` decides once for
            the prompt, only by the descriptions.
        alpha: The factor of the similarity. ``"gated"``: ``alpha_near`` or ``alpha_far``, by ``threshold``. Or one
            number for all prompts.
        alpha_near: The factor if the prompt's largest similarity is above ``threshold``.
        alpha_far: The factor otherwise.
        threshold: A similarity, or ``"descriptions"``: the mean, over experts, of the largest similarity between an
            expert's description and another one. The authors' is 0.8, for their embedder (``"glider-paper"``).
        top_k: Experts per token and layer.
        weights: ``"softmax"`` of the chosen scores, or ``"uniform"``.
        temperature: Temperature of the softmax.
        combine: ``"outputs"``, or another name in :data:`spectr.combine.COMBINATIONS`.

    Source: GLIDER (Li et al., 2024). Their released code sets one alpha by hand.
    """

    token_router: Router | None = field(default_factory=Phatgoose)
    alpha: float | Literal["gated"] = "gated"
    alpha_near: float = 100.0
    alpha_far: float = 3.0
    threshold: float | Literal["descriptions"] = "descriptions"
    top_k: int = 2
    weights: Weighting = "softmax"
    temperature: float = 1.0
    combine: str = "outputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._bias
        inner = self.token_router
        if inner is not None and (inner.policy is not None or isinstance(inner, ShortlistRouter)):
            raise CompositionError(
                f"token_router={inner}", expected="a router that scores every expert for each token, or None"
            )

    @property
    def selection(self) -> TopK:
        """See :class:`Router`."""
        return TopK(k=self.top_k, weighting=self.weights, temperature=self.temperature)

    @property
    def policy(self) -> PromptPolicy:
        """See :class:`PromptRouter`."""
        use = bias = self._bias
        if self.token_router is None:
            use = HoldWeights(top_k=self.top_k, weights=self.weights, temperature=self.temperature, bias=bias)
        router = Reselected(router=self.token_router or Unscored(), chosen=self.selection, combine=self.combine)
        return PromptPolicy(evidence=DescriptionSimilarity(), use=use, router=router)

    @property
    def _bias(self) -> AddToScores:
        return AddToScores(
            alpha=self.alpha, alpha_near=self.alpha_near, alpha_far=self.alpha_far, threshold=self.threshold
        )


@dataclass(frozen=True, kw_only=True)
class Reselected(DelegatingRouter):
    """Another router's scores with a different selection and combination.

    Attributes:
        router: Scores every expert for each token.
        chosen: From scores to weights.
        combine: See :class:`Router`.
    """

    reads = "xh"

    router: Router
    chosen: TopK
    combine: str = "outputs"

    @property
    def scorer(self) -> Router:
        """See :class:`DelegatingRouter`."""
        return self.router

    @property
    def selection(self) -> TopK:
        """See :class:`Router`."""
        return self.chosen

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`: what the other reads of a library, too."""
        return (*super().needs, *(need for need in self.router.needs if need in SIDE_DATA))


@dataclass(frozen=True)
class Unscored(Router):
    """All scores are zero: tokens are not scored."""

    @property
    def selection(self) -> All:
        """See :class:`Router`."""
        return All()

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Tensor, allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`."""
        dtype = torch.promote_types(x_TI.dtype, torch.float32)
        return x_TI.new_zeros(*x_TI.shape[:-1], len(state.ranks), dtype=dtype)
