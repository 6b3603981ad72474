"""What a router, a combination or evidence needs from a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

from spectr.adapters import Expert, has_gates
from spectr.errors import CompositionError, did_you_mean, some_of
from spectr.library.library import ExpertLibrary

_SHOWN = 3


class Need:
    """One requirement for a library.

    Attributes:
        lacking: What is missing in a library that does not meet it.
    """

    lacking: ClassVar[str]

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """Raise unless the library meets it; by default judged by the names of all experts.

        Args:
            library: The library.
            names: The experts that will be used.

        Raises:
            CompositionError: It does not meet it.
            LibraryError: The weights of some experts changed since they were added.
        """
        self.resident(library.names)

    def resident(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The experts that a model must hold; raises if the names alone cannot meet the requirement."""
        return names

    def problems(self, experts: Sequence[Expert]) -> list[CompositionError]:
        """Problems with these experts that are known from their modules alone; by default none."""
        return []


@dataclass(frozen=True)
class AtMost(Need):
    """The library has at least the ``k`` experts that are chosen."""

    k: int
    lacking: ClassVar[str] = "experts"

    def resident(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """See :class:`Need`."""
        if self.k > len(names):
            raise CompositionError(
                f"top_k={self.k}, but the library has {len(names)} expert{'s' * (len(names) != 1)}",
                expected=f"top_k from 1 to {len(names)}",
                do=f"use top_k={len(names)} or less, or add experts",
            )
        return names


@dataclass(frozen=True)
class OneExpert(Need):
    """An expert by name; no other is held."""

    expert: str
    lacking: ClassVar[str] = "the expert"

    def resident(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """See :class:`Need`."""
        if self.expert not in names:
            raise CompositionError(
                f"the oracle's expert '{self.expert}' is not in the library", do=did_you_mean(self.expert, names)
            )
        return (self.expert,)


@dataclass(frozen=True)
class Calibrated(Need):
    """A calibration that covers the experts (:func:`spectr.calibrate`)."""

    lacking: ClassVar[str] = "a calibration"

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        calibration, experts = library.calibration, [library[name] for name in names]
        with ThreadPoolExecutor() as pool:  # hashes files
            covered = pool.map(lambda expert: calibration is not None and calibration.covers(expert), experts)
        missing = [expert for expert, known in zip(experts, covered, strict=True) if not known]
        for expert in missing:
            library.check_weights(expert)
        if missing or calibration is None:
            raise CompositionError(
                f"not calibrated: {', '.join(expert.name for expert in missing)}",
                expected="experts that are measured on texts of the base model",
                do=f"spectr library calibrate --library {library.origin}, or "
                "library.with_calibration(spectr.calibrate(model, library, tokenizer))",
            )


@dataclass(frozen=True)
class Normed(Need):
    """A calibration with means and deviations of the experts' scores."""

    lacking: ClassVar[str] = "means and deviations of scores in its calibration (spectr library calibrate)"

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        CALIBRATED.check(library, names)
        norms = {} if library.calibration is None else library.calibration.norms
        missing = [name for name in names if name not in norms]
        if missing:
            raise CompositionError(
                f"calibrated by an older version, without means and deviations of scores: {some_of(missing, _SHOWN)}",
                expected="both numbers for each expert and module, which the router seqr-normalised needs",
                do=f"spectr library calibrate --library {library.origin} adds them",
            )
        others = [name for name in names if library.calibration is not None and name not in library.calibration.own]
        if others and len(others) < len(names):
            raise CompositionError(
                f"means and deviations are of the base model's texts for {some_of(others, _SHOWN)}, and of their own "
                "training rows for the other experts",
                expected="both numbers from texts of one kind, since the router seqr-normalised compares them",
                do="spectr library calibrate with --own-rows for all experts, or with --fresh for none",
            )


@dataclass(frozen=True)
class Described(Need):
    """A description of every expert in the library."""

    lacking: ClassVar[str] = "descriptions, or of a model that embeds them"

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        missing = [name for name in library if name not in library.descriptions]
        if missing:
            raise CompositionError(
                f"not described: {', '.join(missing)}",
                expected="a description of each expert, which GLIDER compares with prompts",
                do=f"spectr library describe --library {library.origin}, or library.with_descriptions({{...}})",
            )


@dataclass(frozen=True)
class Gated(Need):
    """Trained gates of the experts."""

    lacking: ClassVar[str] = "trained gates"

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        missing = [name for name in names if not has_gates(library[name])]
        if missing:
            raise CompositionError(
                f"no gates were trained for: {', '.join(missing)}",
                expected="experts with gates, which PHATGOOSE uses for routing",
                do=f"spectr train gates --library {library.origin} --data-root DATA; or use the routers "
                "glider-spectr and glider-global, which need no gates",
            )


@dataclass(frozen=True)
class Indexed(Need):
    """An index that matches the experts (:func:`spectr.build_index`).

    Attributes:
        in_full: Whether their full prototypes are needed.
    """

    in_full: bool = False
    lacking: ClassVar[str] = "an index (spectr library index)"

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        if library.calibration is None:
            raise CompositionError(
                "the library is not calibrated",
                expected="a calibrated and indexed library, which the router shortlist needs",
                do=f"spectr library calibrate --library {library.origin}, then spectr library index",
            )
        missing = [name for name in names if not library.indexed(name)]
        if missing:
            first = f"spectr library calibrate --library {library.origin}, then "
            first = "" if all(map(library.calibrated, missing)) else first
            raise CompositionError(
                f"not indexed: {some_of(missing, 5)}",
                expected="stored prototypes and alignment of the experts, which the router shortlist needs",
                do=f"{first}spectr library index --library {library.origin}, or spectr.build_index(model, library)",
            )
        old = [name for name in names if library.index[name].full_C is None] if self.in_full else []
        if old:
            raise CompositionError(
                f"indexed by an older version, in 8 bits only: {some_of(old, 5)}",
                expected="full prototypes, for exact shortlists",
                do=f"spectr library index --library {library.origin} --fresh, or use 8 bits",
            )


@dataclass(frozen=True)
class OfExperts(Need):
    """A requirement on the experts' own modules, which ``problems`` checks."""

    combine: str

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        for problem in self.problems([library[name] for name in names]):
            raise problem


@dataclass(frozen=True)
class EqualRanks(OfExperts):
    """Experts with one rank per module, for the combination ``combine``."""

    lacking: ClassVar[str] = "equal ranks"

    def problems(self, experts: Sequence[Expert]) -> list[CompositionError]:
        """What is wrong with these experts: one error or none."""
        ranks: dict[str, set[int]] = {}
        for expert in experts:
            for module, shape in expert.shapes.items():
                ranks.setdefault(module, set()).add(shape.rank)
        uneven = [module for module, some in ranks.items() if len(some) > 1]
        if not uneven:
            return []
        each = ", ".join(f"{expert.name} {'/'.join(map(str, expert.ranks))}" for expert in experts)
        where = some_of(uneven, _SHOWN, " modules")
        return [
            CompositionError(
                f"combine='{self.combine}' merges factors of unequal ranks ({each}; in {where})",
                expected="experts of one rank",
                do="use combine='outputs', or omit experts",
            )
        ]


@dataclass(frozen=True)
class ProductsAlone(OfExperts):
    """Experts whose update is ``B A x`` only, for the combination ``combine``, which merges such products."""

    lacking: ClassVar[str] = "experts without DoRA and biases"

    def problems(self, experts: Sequence[Expert]) -> list[CompositionError]:
        """See :class:`Need`."""
        more = [expert for expert in experts if expert.exceeds_products]
        if not more:
            return []
        each = some_of([f"{expert.name} ({', '.join(expert.kinds)})" for expert in more], _SHOWN)
        return [
            CompositionError(
                f"combine='{self.combine}' merges products of factors, but these experts have further parts: {each}",
                expected="experts without DoRA and biases",
                do="use combine='outputs', or omit experts",
            )
        ]


@dataclass(frozen=True)
class Nulled(Need):
    """Enough ordinary prompts in the calibration that a share ``abstain`` of them is at least two.

    Attributes:
        abstain: The share of ordinary prompts that may go to an expert.
    """

    abstain: float
    lacking: ClassVar[str] = "ordinary prompts in its calibration (spectr library calibrate)"

    @property
    def least(self) -> int:
        """The number of prompts that is needed."""
        return math.ceil(2 / self.abstain)

    def is_met(self, library: ExpertLibrary) -> bool:
        """Whether a library has enough prompts."""
        return len(_null_of(library)) >= self.least

    def there(self, library: ExpertLibrary) -> str:
        """The number of prompts in a library, as text."""
        count = len(_null_of(library))
        return f"the calibration has {count} ordinary prompts to compare with, but {self.least} are needed"

    def remedy(self, library: ExpertLibrary) -> str:
        """How to get enough prompts, as text."""
        fresh = " --fresh" if _null_of(library) else ""
        return f"spectr library calibrate --library {library.origin}{fresh}"

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        if not self.is_met(library):
            raise CompositionError(
                f"abstain={self.abstain}, but {self.there(library)}",
                expected=f"at least 2 / abstain = {self.least} prompts that the base model wrote",
                do=f"{self.remedy(library)}; or abstain=None, which always chooses an expert",
            )


def _null_of(library: ExpertLibrary) -> Sequence[Sequence[int]]:
    return () if library.calibration is None else library.calibration.null


CALIBRATED, DESCRIBED, GATED, NORMED = Calibrated(), Described(), Gated(), Normed()
SIDE_DATA: tuple[Need, ...] = CALIBRATED, GATED, NORMED  # what a router receives of each expert at each module
