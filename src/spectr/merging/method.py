"""What a method of merging is, and methods by name: built-in ones and those of other packages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor

from spectr.errors import MergeError
from spectr.merging.lowrank import LowRank
from spectr.registry import Registry


class Site(NamedTuple):
    """Where updates meet: a module, and the experts that they belong to, in their order."""

    module: str
    experts: tuple[str, ...]


class Method(Protocol):
    """A way to make one update out of several, module by module. Implementations are frozen dataclasses.

    Attributes:
        name: What :func:`spectr.merging.get_method` knows it by.
    """

    name: ClassVar[str]

    def weights(self, given: Sequence[float] | None, count: int) -> tuple[float, ...]:
        """The number that each expert's update is multiplied by before :meth:`merge` sees it.

        Args:
            given: One for each expert; ``None`` for the method's own.
            count: Number of experts.

        Raises:
            MergeError: The method takes no weights, or needs them, or merges another number of experts.
        """

    def merge(self, deltas: Sequence[LowRank], site: Site) -> LowRank | Float[Tensor, "O I"]:
        """One module's merged update.

        Args:
            deltas: The experts' updates, weighted, float32; of rank 0 where an expert leaves the module alone.
            site: Module and experts.

        Returns:
            Factors where the method has exact ones, else the dense update.
        """


METHODS: Registry[Method] = Registry(
    kind="method",
    group="spectr.merge_methods",
    old_group="spectr.merging",
    error=MergeError,
    entries={
        "average": "spectr.merging.linear:Average",
        "linear": "spectr.merging.linear:Linear",
        "ties": "spectr.merging.ties:Ties",
        "dare": "spectr.merging.dare:Dare",
        "dare-ties": "spectr.merging.dare:DareTies",
        "knots": "spectr.merging.knots:Knots",
        "genknowsub": "spectr.merging.linear:GenKnowSub",
    },
)


def method_names() -> tuple[str, ...]:
    """All names that :func:`get_method` knows, in alphabetical order."""
    return METHODS.names()


def get_method(name: str, **options: Any) -> Method:
    """A method by name.

    Args:
        name: One of :func:`method_names`.
        options: Its settings, as in ``density=0.3``.

    Raises:
        MergeError: The name or an option is unknown, or an option's value is out of range.
    """
    return METHODS.make(name, **options)


def ones(given: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Weights as given, else 1 each."""
    return tuple(given) if given is not None else (1.0,) * count


def shares(given: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Weights as given, else 1 / count each."""
    return tuple(given) if given is not None else (1.0 / count,) * count


def check_settings(method: Method, **settings: Any) -> None:
    """Raise :class:`MergeError` for a ``density`` or ``scale`` that is out of range; all of them at once."""
    wrong = [f"{key}={value}" for key, value in settings.items() if not _RIGHT[key](value)]
    if wrong:
        raise MergeError(
            f"settings of '{method.name}' out of range: {', '.join(wrong)}",
            expected=" and ".join(_EXPECTED[key.split("=")[0]] for key in wrong),
        )


_RIGHT = {"density": lambda d: 0 < d <= 1, "scale": lambda s: math.isfinite(s) and s != 0}
_EXPECTED = {"density": "a density above 0, at most 1", "scale": "a finite scale other than 0"}
