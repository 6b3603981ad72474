"""Similarity of the prompt's words to the experts' descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from spectr.library.needs import DESCRIBED, Need
from spectr.routers.evidence.base import Evidence, Found, Reader, Source


@dataclass(frozen=True, kw_only=True)
class DescriptionSimilarity(Evidence):
    """``cos(e_t, q)``: ``e_t`` embeds the description of expert ``t``, ``q`` an instruction written for the prompt.

    The model must be composed with a guide (:class:`spectr.guidance.QueryGuide`), which writes and embeds.

    Source: GLIDER (Li et al., 2024), section 3.
    """

    knows_p: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Evidence`."""
        return (DESCRIBED,)

    def reader(self, source: Source, experts: tuple[str, ...]) -> Reader:
        """See :class:`Evidence`."""
        assert source.guide is not None
        compare = source.guide.reader(source.library.descriptions, experts)

        def read(*args: Any, **kwargs: Any) -> Found:
            return Found(compare(*args, **kwargs))

        return read
