"""Merges that are sums of updates, and exact in factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from spectr.errors import MergeError
from spectr.merging.lowrank import LowRank
from spectr.merging.method import Site, ones, shares


@dataclass(frozen=True, kw_only=True)
class Average:
    """``delta = (1 / E) sum_t delta_t``, as mu-routing computes it for every token.

    Source: model soups (Wortsman et al., 2022), of updates.
    """

    name: ClassVar[str] = "average"

    def weights(self, given: Sequence[float] | None, count: int) -> tuple[float, ...]:
        """See :class:`spectr.merging.Method`."""
        if given is not None:
            raise MergeError("method 'average' takes no weights", do="omit them, or use the method 'linear'")
        return shares(None, count)

    def merge(self, deltas: Sequence[LowRank], site: Site) -> LowRank:
        """See :class:`spectr.merging.Method`."""
        return LowRank.joined(deltas)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """``delta = sum_t w_t delta_t``.

    Source: task arithmetic (Ilharco et al., 2023).
    """

    name: ClassVar[str] = "linear"

    def weights(self, given: Sequence[float] | None, count: int) -> tuple[float, ...]:
        """See :class:`spectr.merging.Method`."""
        if given is None:
            raise MergeError(
                "method 'linear' needs weights",
                expected=f"{count} number{'s' * (count != 1)}, one for each expert",
                do=f"--weights {','.join(['1'] * count)}, or use the method 'average'",
            )
        return tuple(given)

    def merge(self, deltas: Sequence[LowRank], site: Site) -> LowRank:
        """See :class:`spectr.merging.Method`."""
        return LowRank.joined(deltas)


class _OfOneExpert:
    """What is common to methods that subtract from one expert: the recipe's subtraction is all that they do."""

    name: ClassVar[str]

    def weights(self, given: Sequence[float] | None, count: int) -> tuple[float, ...]:
        """See :class:`spectr.merging.Method`."""
        if count != 1:
            raise MergeError(
                f"method '{self.name}' merges one expert, not {count}",
                expected="one expert",
                do="to subtract from several experts before merging them, use another method with --subtract",
            )
        return ones(given, count)

    def merge(self, deltas: Sequence[LowRank], site: Site) -> LowRank:
        """See :class:`spectr.merging.Method`."""
        return LowRank.joined(deltas)


@dataclass(frozen=True, kw_only=True)
class Products(_OfOneExpert):
    """``delta = delta_t - strength * delta_general`` for one expert; the recipe names what to subtract.

    Exact, and independent of how updates are split into factors, unlike :class:`GenKnowSub`.

    Source: GenKnowSub (Bagherifard et al., 2025), as it is meant; negation of task vectors (Ilharco et al., 2023).
    """

    name: ClassVar[str] = "products"


@dataclass(frozen=True, kw_only=True)
class GenKnowSub(_OfOneExpert):
    """``delta = c_t (B_t - B_general) (A_t - A_general)`` for one expert; the recipe names what to subtract.

    This has cross terms that belong to no expert, and depends on how updates are split into factors.
    :class:`Products` has neither.

    Source: GenKnowSub (Bagherifard et al., 2025), as its authors' code and PEFT compute it.
    """

    name: ClassVar[str] = "genknowsub"
