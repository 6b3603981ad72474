"""Votes by the token router's own scores, such as calibrated spectral ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.library.needs import CALIBRATED, Need
from spectr.routers.evidence.base import ModuleEvidence, ModuleScores


@dataclass(frozen=True, kw_only=True)
class SpectralVotes(ModuleEvidence):
    """Each token votes at each module by a softmax over experts; votes are averaged, one-sided ones counting more.

    ``v_t = softmax_t(log s_t / pool_temperature)``, times the number of experts, so that 1 is neutral. A vote counts
    ``exp(-certainty_weight * entropy(v))``, the entropy in nats. The mean over tokens, then over modules, minus what
    the same experts get on the calibration's texts, plus 1.

    Attributes:
        pool_temperature: Of the softmax, above zero.
        certainty_weight: How much more a one-sided vote counts; 0 counts all alike.
        probe_tokens: Tokens of a prompt that are read at most.

    Source: ours; see docs/routers.md.
    """

    reads: ClassVar[Literal["scores"]] = "scores"

    pool_temperature: float = 0.2
    certainty_weight: float = 4.0
    probe_tokens: int = 256

    def __post_init__(self) -> None:
        if not self.pool_temperature > 0:
            raise CompositionError(f"pool_temperature={self.pool_temperature}", expected="a number above zero")
        if not 0 <= self.certainty_weight < math.inf:
            raise CompositionError(
                f"certainty_weight={self.certainty_weight}", expected="a finite number of at least zero"
            )
        if self.probe_tokens < 1:
            raise CompositionError(f"probe_tokens={self.probe_tokens}", expected="at least 1")

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Evidence`: the calibration's texts."""
        return (CALIBRATED,)

    def of_module(self, scores: ModuleScores) -> Float[Tensor, "B E"]:
        """See :class:`ModuleEvidence`."""
        votes_NE = soft_vote(scores.scores_NE, self.pool_temperature)
        share_NE = votes_NE / votes_NE.shape[-1]
        certainty_N = (self.certainty_weight * torch.special.xlogy(share_NE, share_NE).sum(-1)).exp()
        return scores.mean(votes_NE, certainty_N)


def soft_vote(scores_TE: Float[Tensor, "*T E"], temperature: float) -> Float[Tensor, "*T E"]:
    """The softmax over experts of the scores' logarithm over ``temperature``, times the number of experts."""
    logits_TE = scores_TE.clamp(min=1e-12).log() / temperature
    return logits_TE.softmax(-1) * scores_TE.shape[-1]
