"""Votes by one direction of each expert out of the library's index, with the experts themselves on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.library.needs import Indexed, Need
from spectr.routers.evidence.base import ModuleEvidence, ModuleScores
from spectr.routers.evidence.spectral_votes import soft_vote
from spectr.routers.settings import check_counts


@dataclass(frozen=True, kw_only=True)
class PrototypeVotes(ModuleEvidence):
    """Soft votes by ``|v_t . (x - m)|`` over its root mean square on the calibration's texts; all tokens count alike.

    ``v_t`` is the first row of ``V^T`` (Arrow's prototype). Only the prototypes are in memory. The mean over tokens and
    modules, minus what the same experts get on the calibration's texts, plus 1.

    Attributes:
        probe_tokens: Tokens of a prompt that are read at most.
        modules: Last parts of the names of the modules that take part, such as ``("q_proj", "k_proj")``; no prototypes
            of others are in memory. Empty for all.
        module_stride: Every how many-th of these takes part; more costs less and finds less.
        bits: Of each number of a prototype in memory: 8, 16 or 32. From 16 on the evidence is an interval that holds
            the value that prototypes in full give, in real numbers; where 16 bits do not decide which experts come
            first, the prototypes are read in full.
        pool_temperature: Of the votes, above zero.

    Source: ours, with the prototypes of Arrow (Ostapenko et al., 2024); see docs/scale.md.
    """

    reads: ClassVar[Literal["prototypes"]] = "prototypes"

    probe_tokens: int = 256
    modules: tuple[str, ...] = ()
    module_stride: int = 1
    bits: int = 8
    pool_temperature: float = 0.2

    def __post_init__(self) -> None:
        check_counts(probe_tokens=self.probe_tokens, module_stride=self.module_stride)
        if isinstance(self.modules, str) or not all(isinstance(part, str) and part for part in self.modules):
            raise CompositionError(
                f"modules={self.modules!r}", expected='a tuple of names, such as ("q_proj", "k_proj")'
            )
        if self.bits not in (8, 16, 32):
            raise CompositionError(f"bits={self.bits}", expected="8, or for a list that is certain 16 or 32")
        if not self.pool_temperature > 0:
            raise CompositionError(f"pool_temperature={self.pool_temperature}", expected="a number above zero")

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Evidence`: an index, with prototypes in full for intervals."""
        return (Indexed(self.is_interval),)

    @property
    def is_interval(self) -> bool:
        """Whether the evidence is an interval that holds what prototypes in full give."""
        return self.bits > 8

    def of_module(self, scores: ModuleScores) -> Float[Tensor, "B E"]:
        """See :class:`ModuleEvidence`."""
        votes_NE = soft_vote(scores.scores_NE, self.pool_temperature)
        return scores.mean(votes_NE, torch.ones_like(votes_NE[..., 0]))

    def bounds(
        self, scores_TE: Float[Tensor, "*T E"], off_TE: Float[Tensor, "*T E"]
    ) -> tuple[Float[Tensor, "*T E"], Float[Tensor, "*T E"]]:
        """The least and the most that each token's votes can be, where scores may be off by so much; float64."""
        return vote_bounds(scores_TE, off_TE, self.pool_temperature)


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
