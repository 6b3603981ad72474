"""Similarity of the prompt's words to the experts' descriptions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import SpectrWarning
from spectr.library.needs import DESCRIBED, Need
from spectr.routers.evidence.evidence import ComparingGuide, Evidence, Found, Guide, Reader, Source

AUTHORS_THRESHOLD = 0.8


@dataclass(frozen=True, kw_only=True)
class DescriptionSimilarity(Evidence):
    """``cos(e_t, q)``: ``e_t`` embeds the description of expert ``t``, ``q`` an instruction written for the prompt.

    The model must be composed with a guide (:class:`spectr.guidance.QueryGuide`), which writes and embeds.

    The threshold is ``mean_t max_{u != t} cos(e_t, e_u)`` over all described experts: a prompt of a task that some
    expert knows is to be nearer to that expert's description than descriptions of two tasks are to each other. It
    moves with the embedder, whose cosines may all be small. If the guide cannot compare descriptions
    (:class:`spectr.routers.evidence.ComparingGuide`), the threshold is the authors' 0.8, with a warning.

    Source: GLIDER (Li et al., 2024), section 3; the threshold is ours.
    """

    knows_p: ClassVar[bool] = False
    knows_threshold: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Evidence`."""
        return (DESCRIBED,)

    def reader(self, source: Source, experts: tuple[str, ...]) -> Reader:
        """See :class:`Evidence`."""
        described, guide = source.library.descriptions, source.guide
        assert guide is not None
        compare = guide.reader(described, experts)
        threshold = _threshold(guide, described) if len(described) > 1 else None

        def read(*args: Any, **kwargs: Any) -> Found:
            return Found(compare(*args, **kwargs), threshold=threshold)

        return read


def _threshold(guide: Guide, described: Mapping[str, str]) -> float:
    if isinstance(guide, ComparingGuide):
        return nearest_other(guide.between(described))
    warnings.warn(
        f"threshold='descriptions' has no effect, because {type(guide).__name__} has no method 'between': "
        f"the threshold is {AUTHORS_THRESHOLD}, as with the embedder of GLIDER's authors",
        SpectrWarning,
        stacklevel=2,
    )
    return AUTHORS_THRESHOLD


def nearest_other(cosines_EE: Float[Tensor, "E E"]) -> float:
    """``mean_t max_{u != t} cosines[t, u]``."""
    same_EE = torch.eye(len(cosines_EE), dtype=torch.bool, device=cosines_EE.device)
    return float(cosines_EE.masked_fill(same_EE, -torch.inf).amax(-1).mean())
