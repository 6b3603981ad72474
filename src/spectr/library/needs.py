"""What a router, a combination or evidence for prompts needs of a library."""

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
    """One thing that a library has to provide.

    Attributes:
        lacking: What a library without it lacks, in words.
    """

    lacking: ClassVar[str]

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """Raise unless the library has this; by default by the names of all of its experts.

        Args:
            library: All that there is.
            names: The experts of it that are to be used.

        Raises:
            CompositionError: It does not.
            LibraryError: Some experts have other weights now than when they were added.
        """
        self.resident(library.names)

    def resident(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of a library's experts that a model has to hold; raises where their names alone do not do."""
        return names

    def problems(self, experts: Sequence[Expert]) -> list[CompositionError]:
        """What is wrong with these experts, by what is known of their modules without a library: nothing."""
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
                do=f"choose top_k={len(names)} or less, or add experts",
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
                f"the oracle's expert '{self.expert}' is not there", do=did_you_mean(self.expert, names)
            )
        return (self.expert,)


@dataclass(frozen=True)
class Calibrated(Need):
    """A calibration that covers the experts (:func:`spectr.calibrate`)."""

    lacking: ClassVar[str] = "a calibration"

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        calibration, experts = library.calibration, [library[name] for name in names]
        with ThreadPoolExecutor() as pool:  # files are hashed in it
            covered = pool.map(lambda expert: calibration is not None and calibration.covers(expert), experts)
        missing = [expert for expert, known in zip(experts, covered, strict=True) if not known]
        for expert in missing:
            library.check_weights(expert)
        if missing or calibration is None:
            raise CompositionError(
                f"not calibrated: {', '.join(expert.name for expert in missing)}",
                expected="experts whose answers to the base model's own texts are known",
                do=f"spectr library calibrate --library {library.origin}, or "
                "library.with_calibration(spectr.calibrate(model, library, tokenizer))",
            )


@dataclass(frozen=True)
class Described(Need):
    """A description in words of every expert of the library."""

    lacking: ClassVar[str] = "descriptions, or of a model that embeds them"

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        missing = [name for name in library if name not in library.descriptions]
        if missing:
            raise CompositionError(
                f"not described: {', '.join(missing)}",
                expected="a sentence for each expert that says what it is for, as GLIDER compares prompts with these",
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
                expected="experts with gates of their own, as PHATGOOSE routes by them",
                do=f"spectr train gates --library {library.origin} --data-root DATA; the routers glider-spectr and "
                "glider-global need none",
            )


@dataclass(frozen=True)
class Indexed(Need):
    """An index of the experts as they are (:func:`spectr.build_index`).

    Attributes:
        in_full: Whether their prototypes have to be there in full.
    """

    in_full: bool = False
    lacking: ClassVar[str] = "an index (spectr library index)"

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        if library.calibration is None:
            raise CompositionError(
                "the library is not calibrated",
                expected="a calibrated and indexed library, as the router shortlist decides by its figures",
                do=f"spectr library calibrate --library {library.origin}, then spectr library index with the same",
            )
        missing = [name for name in names if not library.indexed(name)]
        if missing:
            first = f"spectr library calibrate --library {library.origin}, then "
            first = "" if all(map(library.calibrated, missing)) else first
            raise CompositionError(
                f"not indexed: {some_of(missing, 5)}",
                expected="experts whose prototypes and alignment are stored, as the router shortlist needs them",
                do=f"{first}spectr library index --library {library.origin}, or spectr.build_index(model, library)",
            )
        old = [name for name in names if library.index[name].full_C is None] if self.in_full else []
        if old:
            raise CompositionError(
                f"indexed by an older version, in 8 bits alone: {some_of(old, 5)}",
                expected="prototypes in full, for shortlists that are certain",
                do=f"spectr library index --library {library.origin} --fresh, or 8 bits",
            )


@dataclass(frozen=True)
class OfExperts(Need):
    """What the experts' own modules say; ``problems`` finds it."""

    combine: str

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        for problem in self.problems([library[name] for name in names]):
            raise problem


@dataclass(frozen=True)
class EqualRanks(OfExperts):
    """Experts that have one rank at each module, for the combination ``combine``."""

    lacking: ClassVar[str] = "equal ranks"

    def problems(self, experts: Sequence[Expert]) -> list[CompositionError]:
        """What is wrong with these experts; one error, or none."""
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
                do="use combine='outputs', or leave experts out",
            )
        ]


@dataclass(frozen=True)
class ProductsAlone(OfExperts):
    """Experts whose update is ``B A x`` alone, for the combination ``combine``, which merges such products."""

    lacking: ClassVar[str] = "experts without DoRA and biases"

    def problems(self, experts: Sequence[Expert]) -> list[CompositionError]:
        """See :class:`Need`."""
        more = [expert for expert in experts if expert.exceeds_products]
        if not more:
            return []
        each = some_of([f"{expert.name} ({', '.join(expert.kinds)})" for expert in more], _SHOWN)
        return [
            CompositionError(
                f"combine='{self.combine}' merges products of factors, and updates of these experts are more: {each}",
                expected="experts without DoRA and biases",
                do="use combine='outputs', or leave experts out",
            )
        ]


@dataclass(frozen=True)
class Nulled(Need):
    """Ordinary prompts in the calibration, enough that a share ``abstain`` of them is at least two.

    Attributes:
        abstain: The share of ordinary prompts that is to go to an expert.
    """

    abstain: float
    lacking: ClassVar[str] = "ordinary prompts in its calibration (spectr library calibrate)"

    @property
    def least(self) -> int:
        """How many prompts that are."""
        return math.ceil(2 / self.abstain)

    def is_met(self, library: ExpertLibrary) -> bool:
        """Whether a library has as many."""
        return len(_null_of(library)) >= self.least

    def there(self, library: ExpertLibrary) -> str:
        """How many a library has, in words."""
        count = len(_null_of(library))
        return f"the calibration has {count} ordinary prompts to compare with, and {self.least} are needed"

    def remedy(self, library: ExpertLibrary) -> str:
        """What to do about it, in words."""
        fresh = " --fresh" if _null_of(library) else ""
        return f"spectr library calibrate --library {library.origin}{fresh}"

    def check(self, library: ExpertLibrary, names: Sequence[str]) -> None:
        """See :class:`Need`."""
        if not self.is_met(library):
            raise CompositionError(
                f"abstain={self.abstain}, and {self.there(library)}",
                expected=f"at least 2 / abstain = {self.least} prompts that the base model wrote",
                do=f"{self.remedy(library)}; or abstain=None, which always chooses an expert",
            )


def _null_of(library: ExpertLibrary) -> Sequence[Sequence[int]]:
    return () if library.calibration is None else library.calibration.null


CALIBRATED, DESCRIBED, GATED = Calibrated(), Described(), Gated()
SIDE_DATA: tuple[Need, ...] = CALIBRATED, GATED  # what a router is given of each expert at each module
