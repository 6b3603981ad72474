"""Power means of the token router's scores, such as calibrated spectral ones, compared with ordinary prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.library.needs import CALIBRATED, Need
from spectr.routers.evidence.evidence import Found, ModuleEvidence, ModuleScores
from spectr.routers.setting_checks import check_counts

FLOOR, CEILING = (
    0.05,
    1e6,
)  # limits of scores, whose root mean square is 1: a single zero would dominate a geometric mean
LEAST_SPREAD = 1e-3  # least spread of a logarithm among ordinary prompts; 0.03 is common
NO_EVIDENCE = -1e9  # for an expert without effect


@dataclass(frozen=True, kw_only=True)
class ScoreMeans(ModuleEvidence):
    """How far an expert's scores exceed its scores for ordinary prompts.

    Let ``s_t`` be the scores of expert ``t`` at a module. Each prompt has two numbers:
    ``log (mean_tokens s_t^p)^(1/p)``, and the same of the relative score ``s_t / geomean_u s_u`` with ``q`` for ``p``.
    Both are averaged over the modules that the expert adapts. Those for queries, keys and values have a larger weight:
    they tell the experts apart best. The two numbers are standardised by the mean and standard deviation that the
    expert has over ordinary prompts, the baseline. The evidence is the mean of the two. Whether any expert stands out
    is judged by the largest second number, compared with that of each ordinary prompt. The p-value is
    ``p_B = (1 + #{ordinary prompts with as much}) / (1 + #{ordinary prompts})``.

    The first number judges each expert separately, so experts of other ranks, modules or training are compared by their
    effect on ordinary prompts. The second removes what affects all experts, as any instruction does. A module with a
    single expert counts for the first number only; an expert that shares no module is judged by its first number.
    Scores are limited to 0.05 and 1e6, where calibrated ones have the root mean square 1. An expert with zero scores is
    not used.

    Attributes:
        power: The exponent ``p`` of an expert's scores, above 0 and at most 5.
        relative_power: The exponent ``q`` of its relative scores, above 0 and at most 5.
        attention_weight: Weight in the mean over modules of those whose outputs attention reads (queries, keys and
            values), above 0. All other modules have the weight 1.
        probe_tokens: Maximum number of a prompt's tokens that are read.

    Source: ours; see docs/concepts/evidence.md.
    """

    reads: ClassVar[Literal["scores", "prototypes"]] = "scores"  # pyright: ignore[reportIncompatibleVariableOverride]

    calibrated_scores: ClassVar[bool] = True

    power: float = 2.25
    relative_power: float = 5.0
    attention_weight: float = 4.0
    probe_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("power", "relative_power"):
            if not 0 < getattr(self, name) <= 5:  # the fifth power of a score is still a float32
                raise CompositionError(f"{name}={getattr(self, name)}", expected="a number above 0 and at most 5")
        if type(self.attention_weight) not in (int, float) or not 0 < self.attention_weight <= CEILING:
            expected = "a number above 0 and at most 1e6"
            raise CompositionError(f"attention_weight={self.attention_weight!r}", expected=expected)
        check_counts(probe_tokens=self.probe_tokens)

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Evidence`: the calibration's texts."""
        return (CALIBRATED,)

    def of_module(self, scores: ModuleScores) -> Float[Tensor, "2 B E"]:
        """See :class:`ModuleEvidence`: both numbers; NaN if an expert has no score."""
        takes_part_E = (scores.scores_NE > 0).any(0)
        s_NE = scores.scores_NE.clamp(FLOOR, CEILING)
        one_N = torch.ones_like(s_NE[:, 0])
        own_BE, relative_BE = scores.mean(s_NE**self.power, one_N), torch.full((), math.nan, dtype=torch.float32)
        if int(takes_part_E.sum()) > 1:
            level_N1 = s_NE[:, takes_part_E].log().mean(-1, keepdim=True)
            relative_BE = scores.mean(s_NE**self.relative_power * (-self.relative_power * level_N1).exp(), one_N)
        means_2BE = torch.stack([own_BE, relative_BE.to(own_BE).expand_as(own_BE)])
        return self.logarithms(means_2BE).masked_fill(~takes_part_E, math.nan)

    def logarithms(self, means_QBE: Float[Tensor, "*n 2 B E"]) -> Float[Tensor, "*n 2 B E"]:
        """From means of powers to logarithms of power means."""
        powers_2 = torch.tensor([self.power, self.relative_power], dtype=means_QBE.dtype, device=means_QBE.device)
        return means_QBE.clamp(min=torch.finfo(means_QBE.dtype).tiny).log() / powers_2[:, None, None]

    def compare(self, found_QBE: Float[Tensor, "2 B E"], null_QKE: Float[Tensor, "2 K E"], *, ordinary: bool) -> Found:
        """See :class:`ModuleEvidence`."""
        mean_Q1E = null_QKE.nanmean(1, keepdim=True)
        texts_Q1E = (~null_QKE.isnan()).sum(1, keepdim=True)
        squares_Q1E = (null_QKE - mean_Q1E).square().nansum(1, keepdim=True)
        spread_Q1E = (squares_Q1E / (texts_Q1E - 1).clamp(min=1)).sqrt()
        z_QBE, null_z_QKE = ((some - mean_Q1E) / spread_Q1E.clamp(min=LEAST_SPREAD) for some in (found_QBE, null_QKE))
        varies_Q1E = (spread_Q1E >= LEAST_SPREAD) | torch.tensor([True, False])[:, None, None]
        z_QBE, null_z_QKE = (some.masked_fill(~varies_Q1E, math.nan) for some in (z_QBE, null_z_QKE))
        p_B = p_value(largest(z_QBE), largest(left_out(null_z_QKE, null_QKE.shape[1]))) if ordinary else None
        return Found(z_QBE.nanmean(0).nan_to_num(nan=NO_EVIDENCE), p_B)


def largest(z_QNE: Float[Tensor, "2 N E"]) -> Float[Tensor, " N"]:
    """How far the leading expert stands out; judged by its scores alone if it shares no module."""
    own_NE, relative_NE = z_QNE
    return torch.where(relative_NE.isnan(), own_NE, relative_NE).nan_to_num(nan=NO_EVIDENCE).amax(-1)


def left_out(z_QKE: Float[Tensor, "*q K E"], texts: int) -> Float[Tensor, "*q K E"]:
    """Standardise each text of a null by the other texts, starting from values that include the text.

    A prompt is standardised by all texts. Without this, more prompts than texts would stand out.
    """
    if texts < 3:
        return z_QKE
    rest_QKE = ((texts - 1) - z_QKE.square() * texts / (texts - 1)) / (texts - 2)
    return z_QKE * texts / (texts - 1) / rest_QKE.clamp(min=1e-6).sqrt()


def p_value(found_B: Float[Tensor, " B"], null_K: Float[Tensor, " K"]) -> Float[Tensor, " B"]:
    """The share of the null that is at least as large, counting the prompt itself."""
    return (1 + (null_K >= found_B[:, None]).sum(-1)) / (1 + len(null_K))
