"""How the evidence for a whole prompt is used.

Legend: B rows of the batch, T tokens of a row (1: the same for all of a row's tokens), E experts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.routers.setting_checks import check_counts
from spectr.selection import TopK, Weighting, largest


class Rows(NamedTuple):
    """A verdict for the rows of a call; see :class:`spectr.layers.batch_routing.BatchRouting`."""

    weights_BTE: Float[Tensor, "B T E"] | None = None
    prior_BTE: Float[Tensor, "B T E"] | None = None
    among_BTE: Bool[Tensor, "B T E"] | None = None


class Use(ABC):
    """From evidence to a verdict, a number for each prompt and expert, and its effect on the prompt's tokens.

    A frozen dataclass that is its own configuration. Methods that are not abstract fit a verdict that informs the
    scores of each token.

    Attributes:
        fixes: Whether the verdict gives the weights of all tokens of the prompt, so that no token chooses.
        gathers: Whether an expert with the number zero is not used, so that its factors need not be in memory.
        neutral: The number of an expert about which nothing is known.
        excluded: The number of an expert that is not used. If all experts have it, the base model answers. Zero
            for a use that fixes or gathers.
        in_kernels: Whether scores are informed by a product only, as in kernels.
    """

    fixes: ClassVar[bool] = False
    gathers: ClassVar[bool] = False
    neutral: ClassVar[float] = 0.0
    excluded: ClassVar[float] = -math.inf
    in_kernels: ClassVar[bool] = False

    @property
    def most(self) -> int | None:
        """Maximum number of experts that are used for a prompt; ``None``: all."""
        return None

    @abstractmethod
    def verdict(self, evidence_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """From evidence to the verdict, float32."""

    def verdict_above(self, evidence_BE: Float[Tensor, "B E"], threshold: float | None) -> Float[Tensor, "B E"]:
        """The same, with the evidence above which some expert knows a prompt's task; most uses ignore it."""
        return self.verdict(evidence_BE)

    @property
    def multiplies(self) -> bool:
        """Whether scores are multiplied, which turns the evidence around for scores below zero."""
        return False

    @property
    def wants_threshold(self) -> bool:
        """Whether :meth:`verdict_above` reads the threshold."""
        return False

    def informed(self, scores_TE: Float[Tensor, "*T E"], verdict_TE: Float[Tensor, "*B E"]) -> Float[Tensor, "*T E"]:
        """A token's scores with the prompt's numbers: one row of numbers for a row of tokens, or one for each token."""
        return scores_TE

    def rows(self, verdict_BTE: Float[Tensor, "B T E"], among_BTE: Bool[Tensor, "B T E"] | None = None) -> Rows:
        """A verdict's effect on a call.

        Args:
            verdict_BTE: A number for each expert.
            among_BTE: The experts that a row may use; by default all.
        """
        taking_BTE = verdict_BTE != self.excluded
        if not bool(taking_BTE.all()):
            among_BTE = taking_BTE if among_BTE is None else taking_BTE & among_BTE
        return Rows(prior_BTE=verdict_BTE, among_BTE=among_BTE)


@dataclass(frozen=True, kw_only=True)
class MultiplyScores(Use):
    """The evidence is a prior: each token's scores are multiplied by ``exp(strength * evidence)``.

    Attributes:
        strength: 0 leaves scores unchanged; with larger values the prompt has more influence.
    """

    neutral: ClassVar[float] = 1.0
    excluded: ClassVar[float] = 0.0
    in_kernels: ClassVar[bool] = True

    strength: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise CompositionError(f"prior_strength={self.strength}", expected="a finite number of at least zero")

    @property
    def multiplies(self) -> bool:
        """See :class:`Use`."""
        return True

    def verdict(self, evidence_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """See :class:`Use`: the prior, above zero, so that a shortlist keeps every expert."""
        below_BE = evidence_BE - evidence_BE.amax(-1, keepdim=True)
        return (self.strength * below_BE).exp().clamp(min=torch.finfo(torch.float32).tiny)

    def informed(self, scores_TE: Float[Tensor, "*T E"], verdict_TE: Float[Tensor, "*B E"]) -> Float[Tensor, "*T E"]:
        """See :class:`Use`: their product."""
        return scores_TE * verdict_TE


@dataclass(frozen=True, kw_only=True)
class AddToScores(Use):
    """The evidence is a bias: ``alpha`` times it is added to each token's scores.

    Attributes:
        alpha: ``"gated"``: ``alpha_near`` if the prompt's largest evidence is above ``threshold``, as for a task that
            some expert knows, else ``alpha_far``. Or one number for all prompts.
        alpha_near: See ``alpha``.
        alpha_far: See ``alpha``.
        threshold: See ``alpha``: a number, or ``"descriptions"``, which takes the evidence's own
            (:attr:`spectr.routers.evidence.Found.threshold`). The authors' 0.8 belongs to their embedder.

    Source: GLIDER (Li et al., 2024). Their released code sets one alpha by hand.
    """

    alpha: float | Literal["gated"] = "gated"
    alpha_near: float = 100.0
    alpha_far: float = 3.0
    threshold: float | Literal["descriptions"] = 0.8

    def __post_init__(self) -> None:
        for name, word in (("alpha", "gated"), ("threshold", "descriptions")):
            value = getattr(self, name)
            if isinstance(value, str) and value != word:
                raise CompositionError(f"{name}={value!r}", expected=f"a number, or '{word}'")

    @property
    def wants_threshold(self) -> bool:
        """See :class:`Use`."""
        return isinstance(self.alpha, str) and isinstance(self.threshold, str)

    def verdict(self, evidence_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """See :class:`Use`: the bias."""
        return self.verdict_above(evidence_BE, None)

    def verdict_above(self, evidence_BE: Float[Tensor, "B E"], threshold: float | None) -> Float[Tensor, "B E"]:
        """See :class:`Use`."""
        if not isinstance(self.alpha, str):
            return self.alpha * evidence_BE
        threshold = threshold if isinstance(self.threshold, str) else self.threshold
        if threshold is None:
            if evidence_BE.shape[-1] > 1:
                raise CompositionError(
                    "threshold='descriptions', and the evidence knows no threshold for this prompt",
                    expected="evidence that sets Found.threshold, as spectr.routers.DescriptionSimilarity does",
                    do="give a number, such as threshold=0.8",
                )
            threshold = math.inf  # one expert, whom no bias moves
        near_B1 = evidence_BE.amax(-1, keepdim=True) > threshold
        return torch.where(near_B1, self.alpha_near * evidence_BE, self.alpha_far * evidence_BE)

    def informed(self, scores_TE: Float[Tensor, "*T E"], verdict_TE: Float[Tensor, "*B E"]) -> Float[Tensor, "*T E"]:
        """See :class:`Use`: their sum."""
        return scores_TE + verdict_TE


@dataclass(frozen=True, kw_only=True)
class HoldWeights(Use):
    """The experts with the most evidence have fixed weights for the whole answer.

    Attributes:
        top_k: Number of experts.
        weights: ``"uniform"`` (``1 / k``) or ``"softmax"`` of their evidence.
        temperature: Temperature of the softmax.
        bias: Turns evidence into the bias that weights are made from; by default they are made from the evidence.
    """

    fixes: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    excluded: ClassVar[float] = 0.0

    top_k: int = 1
    weights: Weighting = "uniform"
    temperature: float = 1.0
    bias: AddToScores | None = None

    def __post_init__(self) -> None:
        _ = self.selection

    @property
    def selection(self) -> TopK:
        """From evidence to weights."""
        return TopK(k=self.top_k, weighting=self.weights, temperature=self.temperature)

    @property
    def most(self) -> int:
        """See :class:`Use`."""
        return self.top_k

    def verdict(self, evidence_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """See :class:`Use`: the weights."""
        return self.verdict_above(evidence_BE, None)

    def verdict_above(self, evidence_BE: Float[Tensor, "B E"], threshold: float | None) -> Float[Tensor, "B E"]:
        """See :class:`Use`."""
        scored_BE = evidence_BE if self.bias is None else self.bias.verdict_above(evidence_BE, threshold)
        return self.selection(scored_BE).float()

    @property
    def wants_threshold(self) -> bool:
        """See :class:`Use`."""
        return self.bias is not None and self.bias.wants_threshold

    def rows(self, verdict_BTE: Float[Tensor, "B T E"], among_BTE: Bool[Tensor, "B T E"] | None = None) -> Rows:
        """See :class:`Use`."""
        return Rows(weights_BTE=verdict_BTE)


@dataclass(frozen=True, kw_only=True)
class KeepShortlist(Use):
    """Tokens choose among the experts with the most evidence.

    Attributes:
        size: Number of experts.
        prior: How their evidence also informs the tokens' scores; by default it does not.
    """

    gathers: ClassVar[bool] = True
    excluded: ClassVar[float] = 0.0
    in_kernels: ClassVar[bool] = True

    size: int = 16
    prior: MultiplyScores | None = None

    def __post_init__(self) -> None:
        check_counts(size=self.size)

    @property
    def most(self) -> int:
        """See :class:`Use`."""
        return self.size

    @property
    def multiplies(self) -> bool:
        """See :class:`Use`: as the prior."""
        return self.prior is not None

    def verdict(self, evidence_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """See :class:`Use`: zero for experts off the shortlist; for the others the prior, or equal numbers."""
        _, index_BK = largest(evidence_BE, min(self.size, evidence_BE.shape[-1]))
        listed_BE = torch.zeros_like(evidence_BE).scatter(-1, index_BK, 1.0)
        if self.prior is not None:
            return (self.prior.verdict(evidence_BE) * listed_BE).float()
        return (listed_BE / index_BK.shape[-1]).float()

    def informed(self, scores_TE: Float[Tensor, "*T E"], verdict_TE: Float[Tensor, "*B E"]) -> Float[Tensor, "*T E"]:
        """See :class:`Use`: like the prior."""
        return scores_TE if self.prior is None else self.prior.informed(scores_TE, verdict_TE)

    def rows(self, verdict_BTE: Float[Tensor, "B T E"], among_BTE: Bool[Tensor, "B T E"] | None = None) -> Rows:
        """See :class:`Use`."""
        return Rows(prior_BTE=None if self.prior is None else verdict_BTE, among_BTE=verdict_BTE != 0)
