"""The interface of merging methods, and methods by name, built-in and from other packages."""

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
    """One module, and the experts of its updates, in order."""

    module: str
    experts: tuple[str, ...]


class Method(Protocol):
    """Merges several updates into one, module by module. Implementations are frozen dataclasses.

    Attributes:
        name: Its name for :func:`spectr.merging.get_method`.
    """

    name: ClassVar[str]

    def weights(self, given: Sequence[float] | None, count: int) -> tuple[float, ...]:
        """The factor of each expert's update, which is applied before :meth:`merge`.

        Args:
            given: One per expert; ``None`` for the method's default.
            count: Number of experts.

        Raises:
            MergeError: The method takes no weights, or requires them, or merges another number of experts.
        """
        ...

    def merge(self, deltas: Sequence[LowRank], site: Site) -> LowRank | Float[Tensor, "O I"]:
        """One module's merged update.

        Args:
            deltas: The experts' weighted updates, float32; of rank 0 if an expert does not adapt the module.
            site: Module and experts.

        Returns:
            Factors if the method has exact ones, else the dense update.
        """
        ...


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
        "products": "spectr.merging.linear:Products",
    },
)


def method_names() -> tuple[str, ...]:
    """All names for :func:`get_method`, in alphabetical order."""
    return METHODS.names()


def get_method(name: str, **options: Any) -> Method:
    """Make a method by name.

    Args:
        name: One of :func:`method_names`.
        options: Its settings, such as ``density=0.3``.

    Raises:
        MergeError: The name or an option is unknown, or a value is out of range.
    """
    return METHODS.make(name, **options)


def ones(given: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The given weights, else 1 each."""
    return tuple(given) if given is not None else (1.0,) * count


def shares(given: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """The given weights, else 1 / count each."""
    return tuple(given) if given is not None else (1.0 / count,) * count


def check_settings(method: Method, **settings: Any) -> None:
    """Raise one :class:`MergeError` for all of ``density`` and ``scale`` that are out of range."""
    wrong = [f"{key}={value}" for key, value in settings.items() if not _RIGHT[key](value)]
    if wrong:
        raise MergeError(
            f"settings of '{method.name}' out of range: {', '.join(wrong)}",
            expected=" and ".join(_EXPECTED[key.split("=")[0]] for key in wrong),
        )


_RIGHT = {"density": lambda d: 0 < d <= 1, "scale": lambda s: math.isfinite(s) and s != 0}
_EXPECTED = {"density": "a density above 0, at most 1", "scale": "a finite scale that is not 0"}
