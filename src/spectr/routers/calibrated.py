"""Self-calibrated routing: how much more than usual an expert answers to an input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.library.needs import CALIBRATED, Need
from spectr.routers.base import LengthRouter, Lengths, ProbingRouter
from spectr.routers.settings import check_settings
from spectr.routers.use import HoldWeights, InformScores, Use
from spectr.selection import TopK, Weighting
from spectr.spectral import AlignedExpert, InputState, Share, SideData, State, segment_norms

_USES: dict[str, Use | None] = {"prompt": HoldWeights(), "token": None, "prior": InformScores()}


class Centers(NamedTuple):
    """``A*_t m / c_t`` of each expert, one after the other."""

    centers_P: Float[Tensor, " P"]


@dataclass(frozen=True, kw_only=True)
class Calibrated(LengthRouter, ProbingRouter):
    """``||A*_t (x - m)|| / c_t``: the spectral score less what is the same for every input.

    ``m`` is a module's mean input and ``c_t`` the root mean square of ``||A*_t (x - m)||``, both over texts that the
    base model wrote itself (:func:`spectr.calibrate`), so that an expert's size buys it nothing. For a prompt every
    token votes at every module, by the softmax over experts of the scores' logarithm over ``pool_temperature``; a vote
    counts ``exp(-certainty_weight * entropy)``; the means over tokens and modules, less what the same experts get on
    the calibration's texts, are the evidence.

    Attributes:
        level: ``"prompt"`` decides once for each prompt and holds the decision while the answer is written;
            ``"token"`` decides for each token and module, as the paper does; ``"prior"`` does that too, with each
            score multiplied by the prompt's evidence to the power ``prior_strength``.
        top_k: Experts for each prompt, or for each token and module.
        weights: ``"uniform"`` (``1 / k``) or ``"softmax"`` of the chosen evidence (prompt) or scores (token).
        temperature: Of that softmax.
        pool_temperature: Of the soft votes.
        certainty_weight: How much more a one-sided vote counts; 0 counts all alike.
        prior_strength: 0 is ``level="token"``; the larger, the more the prompt decides.
        probe_tokens: Tokens of a prompt that are read for the decision at most.
        combine: ``"outputs"``, or another of :data:`spectr.combine.COMBINATIONS`.

    Source: ours; see docs/routers.md.
    """

    level: Literal["prompt", "token", "prior"] = "prompt"
    top_k: int = 1
    weights: Weighting = "uniform"
    temperature: float = 1.0
    pool_temperature: float = 0.2
    certainty_weight: float = 4.0
    prior_strength: float = 8.0
    probe_tokens: int = 256
    combine: str = "outputs"

    def __post_init__(self) -> None:
        check_settings(self, level=(self.level, tuple(_USES)))
        if not self.pool_temperature > 0:
            raise CompositionError(f"pool_temperature={self.pool_temperature}", expected="a number above zero")
        for name in ("prior_strength", "certainty_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise CompositionError(f"{name}={getattr(self, name)}", expected="a finite number of at least zero")
        if self.probe_tokens < 1:
            raise CompositionError(f"probe_tokens={self.probe_tokens}", expected="at least 1")

    @property
    def selection(self) -> TopK:
        """See :class:`Router`."""
        return TopK(k=self.top_k, weighting=self.weights, temperature=self.temperature)

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`."""
        return (*super().needs, CALIBRATED)

    @property
    def use(self) -> Use | None:
        """See :class:`Router`: as the level says."""
        return _USES[self.level]

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`: ``A* / c``, ``B* c`` and ``A* m / c``, so that the scores have the root mean square 1.

        An expert that does nothing here (``c`` 0) stays as it is.
        """
        assert side.mean_I is not None
        share, rms = Share.spectral(expert.aligned), side.rms or 1.0
        A = share.A / rms
        return Share(A, share.B * rms, own=Centers(A @ side.mean_I))

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Float[Tensor, "*T P"], allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: ``||A*_t (x - m)|| / c_t``."""
        return segment_norms(h_TP - state.own.centers_P, state)

    def lengths(self, state: InputState) -> Lengths:
        """See :class:`LengthRouter`."""
        return Lengths(state.A_PI, state.own.centers_P)

    def evidence(self, scores_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T E"]:
        """See :class:`ProbingRouter`: the soft vote, times the number of experts."""
        return soft_vote(scores_TE, self.pool_temperature)

    def certainty(self, evidence_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T"]:
        """See :class:`ProbingRouter`: ``exp(-certainty_weight * entropy)`` of the vote, in nats."""
        vote_TE = evidence_TE / evidence_TE.shape[-1]
        return (self.certainty_weight * torch.special.xlogy(vote_TE, vote_TE).sum(-1)).exp()

    def verdict(self, evidence_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """See :class:`PromptRouter`."""
        if self.use == HoldWeights():
            return self.selection(evidence_BE)
        return evidence_BE.clamp(min=1e-3) ** self.prior_strength

    def informed(self, scores_TE: Float[Tensor, "*T E"], prior_B1E: Float[Tensor, "B _ E"]) -> Float[Tensor, "*T E"]:
        """See :class:`PromptRouter`: their product."""
        return scores_TE * prior_B1E


def soft_vote(scores_TE: Float[Tensor, "*T E"], temperature: float) -> Float[Tensor, "*T E"]:
    """The softmax over experts of the scores' logarithm over ``temperature``, times the number of experts."""
    logits_TE = scores_TE.clamp(min=1e-12).log() / temperature
    return logits_TE.softmax(-1) * scores_TE.shape[-1]


def vote_bounds(
    scores_TE: Float[Tensor, "*T E"], off_TE: Float[Tensor, "*T E"], temperature: float
) -> tuple[Float[Tensor, "*T E"], Float[Tensor, "*T E"]]:
    """The least and the most that each expert's :func:`soft_vote` can be, where scores may be off by so much.

    A vote is least where its own score is low and all others are high, and most the other way round. Float64, and what
    that rounds is allowed for: sums of E terms, and exponents of up to 200 over the temperature.
    """
    experts = scores_TE.shape[-1]
    low_TE, high_TE = ((scores_TE + by).clamp(min=1e-12).log() / temperature for by in (-off_TE, off_TE))
    top_T1 = high_TE.amax(-1, keepdim=True)
    low_TE = (low_TE - top_T1).exp()
    high_TE = (high_TE - top_T1).clamp(min=-700).exp()  # not to zero, from which it could not be raised again
    summing = 2.0**-52 * experts
    low_T1, high_T1 = low_TE.sum(-1, keepdim=True), high_TE.sum(-1, keepdim=True)
    least_TE = low_TE / ((high_T1 - high_TE).clamp(min=0) + low_TE + summing * high_T1)
    most_TE = high_TE / ((low_T1 - low_TE - summing * low_T1).clamp(min=0) + high_TE)
    rounding = 2.0**-50 * (experts + 200 / temperature)
    return least_TE * (experts * (1 - rounding)), most_TE * (experts * (1 + rounding))
