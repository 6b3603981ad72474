"""Power means of the token router's scores, such as calibrated spectral ones, against those of ordinary prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.library.needs import CALIBRATED, Need
from spectr.routers.evidence.base import Found, ModuleEvidence, ModuleScores
from spectr.routers.settings import check_counts

FLOOR, CEILING = 0.05, 1e6  # of scores, whose root mean square is 1: one zero would move a geometric mean far
LEAST_SPREAD = 1e-3  # of a logarithm among ordinary prompts; 0.03 is common
NO_EVIDENCE = -1e9  # of an expert that does nothing anywhere


@dataclass(frozen=True, kw_only=True)
class ScoreMeans(ModuleEvidence):
    """How far an expert's scores are above those that it has for ordinary prompts.

    With ``s_t`` the scores of expert ``t`` at a module, two numbers for each prompt: ``log (mean_tokens s_t^p)^(1/p)``,
    and the same of the relative score ``s_t / geomean_u s_u`` with ``q`` for ``p``. Both are averaged over the modules
    that the expert adapts, and standardised by the mean and the standard deviation that the same expert has over
    ordinary prompts (the null). The evidence is the mean of the two. Whether any expert stands out is seen from the
    largest of the second, compared with the null's largest: ``p_B = (1 + #{null >= it}) / (1 + #null)``.

    The first takes each expert by itself, so that experts of other ranks, modules or training are compared by what each
    does for ordinary prompts. The second takes away what moves all experts, as any instruction does. A module where no
    other expert is counts for the first alone; an expert that shares no module is judged by its first number. Scores
    are kept between 0.05 and 1e6, where calibrated ones have the root mean square 1. An expert whose scores are zero
    takes no part.

    Attributes:
        power: ``p``, above zero.
        relative_power: ``q``, above zero.
        probe_tokens: Tokens of a prompt that are read at most.

    Source: ours; see docs/concepts/evidence.md.
    """

    reads: ClassVar[Literal["scores", "prototypes"]] = "scores"  # pyright: ignore[reportIncompatibleVariableOverride]

    calibrated_scores: ClassVar[bool] = True

    power: float = 2.25
    relative_power: float = 5.0
    probe_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("power", "relative_power"):
            if not 0 < getattr(self, name) <= 5:  # the fifth power of a score is still a float32
                raise CompositionError(f"{name}={getattr(self, name)}", expected="a number above 0 and at most 5")
        check_counts(probe_tokens=self.probe_tokens)

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Evidence`: the calibration's texts."""
        return (CALIBRATED,)

    def of_module(self, scores: ModuleScores) -> Float[Tensor, "2 B E"]:
        """See :class:`ModuleEvidence`: both numbers, NaN where an expert takes no part."""
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
    """How far the expert that does so most stands out; of one that shares no module by its scores alone."""
    own_NE, relative_NE = z_QNE
    return torch.where(relative_NE.isnan(), own_NE, relative_NE).nan_to_num(nan=NO_EVIDENCE).amax(-1)


def left_out(z_QKE: Float[Tensor, "*q K E"], texts: int) -> Float[Tensor, "*q K E"]:
    """Each text of a null standardised by the others, as a prompt is by all: from the values that include it.

    Without this a text is held back by itself, and more prompts than texts would be found to stand out.
    """
    if texts < 3:
        return z_QKE
    rest_QKE = ((texts - 1) - z_QKE.square() * texts / (texts - 1)) / (texts - 2)
    return z_QKE * texts / (texts - 1) / rest_QKE.clamp(min=1e-6).sqrt()


def p_value(found_B: Float[Tensor, " B"], null_K: Float[Tensor, " K"]) -> Float[Tensor, " B"]:
    """The share of the null that is as large, where the prompt itself counts among it."""
    return (1 + (null_K >= found_B[:, None]).sum(-1)) / (1 + len(null_K))
