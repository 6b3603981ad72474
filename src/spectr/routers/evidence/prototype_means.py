"""Power means of scores by one direction of each expert, from the library's index, with the experts on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.library.needs import Indexed, Need
from spectr.routers.evidence.score_means import CEILING, FLOOR, ScoreMeans
from spectr.routers.setting_checks import check_counts


@dataclass(frozen=True, kw_only=True)
class PrototypeMeans(ScoreMeans):
    """:class:`ScoreMeans` of ``|v_t . (x - m)|`` over its root mean square on the calibration's texts.

    ``v_t`` is the first row of ``V^T`` (Arrow's prototype). Only the prototypes are in memory.

    Attributes:
        power: The exponent of an expert's scores, as in :class:`ScoreMeans`.
        relative_power: The exponent of its relative scores, as in :class:`ScoreMeans`.
        attention_weight: As in :class:`ScoreMeans`.
        probe_tokens: Maximum number of a prompt's tokens that are read.
        modules: Last parts of the names of the modules to use, such as ``("q_proj", "k_proj")``; other modules'
            prototypes are not in memory. Empty for all.
        module_stride: Use every N-th of these modules; larger is faster and less accurate.
        bits: Bits per number of a prototype in memory: 8, 16 or 32. From 16 on, the evidence is an interval that
            contains the value of full prototypes, in real numbers. If 16 bits do not decide which experts come first,
            the full prototypes are read.

    Source: ours, with the prototypes of Arrow (Ostapenko et al., 2024); see docs/howto/scale.md.
    """

    reads: ClassVar[Literal["scores", "prototypes"]] = "prototypes"
    calibrated_scores: ClassVar[bool] = False  # the index has its own calibration

    attention_weight: float = 1.0
    modules: tuple[str, ...] = ()
    module_stride: int = 1
    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(module_stride=self.module_stride)
        if isinstance(self.modules, str) or not all(isinstance(part, str) and part for part in self.modules):
            raise CompositionError(
                f"modules={self.modules!r}", expected='a tuple of names, such as ("q_proj", "k_proj")'
            )
        if self.bits not in (8, 16, 32):
            raise CompositionError(f"bits={self.bits}", expected="8; or 16 or 32 for an exact list")

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Evidence`: an index, with full prototypes for intervals."""
        return (Indexed(self.is_interval),)

    @property
    def is_interval(self) -> bool:
        """Whether the evidence is an interval that contains the value of full prototypes."""
        return self.bits > 8

    def token_bounds(
        self, scores_TE: Float[Tensor, "T E"], off_TE: Float[Tensor, "T E"]
    ) -> tuple[Float[Tensor, "2 T E"], Float[Tensor, "2 T E"]]:
        """The least and the most that a token adds to both means, if scores may differ by this much; float64.

        Both grow with the expert's own score; the second falls with all other scores. The bounds include float64's
        rounding: sums of E logarithms, and powers.
        """
        takes_part_E = scores_TE.amax(0) + off_TE.amax(0) > 0
        low_TE, high_TE = ((scores_TE + by).clamp(FLOOR, CEILING) for by in (-off_TE, off_TE))
        rounding = 2.0**-50 * (64 + int(takes_part_E.sum()))
        bounds = []
        for own_TE, others_TE, by in ((low_TE, high_TE, -rounding), (high_TE, low_TE, rounding)):
            logs_T1 = others_TE[:, takes_part_E].log().mean(-1, keepdim=True)
            shared_TE = (own_TE.log() - others_TE.log()) / max(1, int(takes_part_E.sum()))  # the own term, once
            relative_TE = (self.relative_power * (own_TE.log() - logs_T1 - shared_TE)).exp()
            bound_2TE = torch.stack([own_TE**self.power, relative_TE]) * (1 + by)
            bound_2TE[1] = bound_2TE[1] if int(takes_part_E.sum()) > 1 else torch.nan
            bounds.append(bound_2TE.masked_fill(~takes_part_E, torch.nan))
        return bounds[0], bounds[1]
