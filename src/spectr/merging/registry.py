"""Methods by name, the built-in ones and those of other packages (:mod:`spectr.registry`)."""

from __future__ import annotations

from typing import Any

from spectr.errors import MergeError
from spectr.merging.method import Method
from spectr.registry import Registry

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
