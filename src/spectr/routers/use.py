"""What is done with what was found of a whole prompt.

Legend: B rows of the batch, T tokens of a row (1: the same for all of a row's tokens), E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor


class Rows(NamedTuple):
    """A verdict as it holds for the rows of a call; see :class:`spectr.layers.batch_routing.BatchRouting`."""

    weights_BTE: Float[Tensor, "B T E"] | None = None
    prior_BTE: Float[Tensor, "B T E"] | None = None
    among_BTE: Bool[Tensor, "B T E"] | None = None


class Use(ABC):
    """How a verdict holds for a call.

    Attributes:
        fixes: Whether it is the weights of all of the prompt's tokens, so that no token chooses.
        gathers: Whether an expert whose number is zero takes no part, so that its factors need not be there.
        neutral: What stands for an expert of which nothing is known.
    """

    fixes: ClassVar[bool] = False
    gathers: ClassVar[bool] = True
    neutral: ClassVar[float] = 0.0

    @abstractmethod
    def rows(self, verdict_BTE: Float[Tensor, "B T E"], among_BTE: Bool[Tensor, "B T E"] | None = None) -> Rows:
        """What a verdict makes of a call.

        Args:
            verdict_BTE: A number for each expert.
            among_BTE: Those that a row may use; all, if left out.
        """


@dataclass(frozen=True)
class HoldWeights(Use):
    """The verdict is the experts' weights."""

    fixes: ClassVar[bool] = True

    def rows(self, verdict_BTE: Float[Tensor, "B T E"], among_BTE: Bool[Tensor, "B T E"] | None = None) -> Rows:
        """See :class:`Use`."""
        return Rows(weights_BTE=verdict_BTE)


@dataclass(frozen=True)
class InformScores(Use):
    """The verdict is a prior of each token's scores."""

    gathers: ClassVar[bool] = False
    neutral: ClassVar[float] = 1.0

    def rows(self, verdict_BTE: Float[Tensor, "B T E"], among_BTE: Bool[Tensor, "B T E"] | None = None) -> Rows:
        """See :class:`Use`."""
        return Rows(prior_BTE=verdict_BTE, among_BTE=among_BTE)


@dataclass(frozen=True)
class KeepShortlist(Use):
    """Tokens choose among the experts whose number is not zero.

    Attributes:
        informs: Whether these numbers are a prior of their scores too.
    """

    informs: bool

    def rows(self, verdict_BTE: Float[Tensor, "B T E"], among_BTE: Bool[Tensor, "B T E"] | None = None) -> Rows:
        """See :class:`Use`."""
        return Rows(prior_BTE=verdict_BTE if self.informs else None, among_BTE=verdict_BTE != 0)
