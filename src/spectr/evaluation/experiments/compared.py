"""The routers that an experiment compares: those that were asked for, with their settings, as far as they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectr.evaluation.experiments.base import Bench
from spectr.library.needs import DESCRIBED
from spectr.routers import Router, first_lack, get_router
from spectr.routers.options import read_settings


def routers_that_fit(names: Sequence[tuple[str, dict[str, Any]]], bench: Bench) -> list[tuple[str, Router]]:
    """Routers with a label each, less those for which the library lacks something (:func:`unfit_in_words`).

    Args:
        names: Of the routers that the experiment compares, with their settings. Others that were asked for have none.
        bench: Says which were asked for, and what there is.
    """
    chosen = [(_label(name, options), get_router(name, **options)) for name, options in _asked(names, bench)]
    return [(label, router) for label, router in chosen if _lacks(router, bench) is None]


def unfit_in_words(names: Sequence[tuple[str, dict[str, Any]]], bench: Bench) -> list[str]:
    """What is to be said of routers that were left out: which, and what the library lacks for them."""
    found: dict[str, list[str]] = {}
    for name, options in _asked(names, bench):
        lack = _lacks(get_router(name, **options), bench)
        if lack:
            found.setdefault(lack, []).append(_label(name, options))
    return [f"Left out for lack of {lack}: {'; '.join(labels)}." for lack, labels in found.items()]


def _asked(names: Sequence[tuple[str, dict[str, Any]]], bench: Bench) -> Sequence[tuple[str, dict[str, Any]]]:
    """The routers to compare, each with its settings once; those of the bench win."""
    compared = {name for name, _ in names}
    more: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in bench.only if name not in compared]
    asked = [*(pair for pair in names if not bench.only or pair[0] in bench.only), *more]
    if not bench.settings:
        return asked
    given = read_settings(bench.settings, list(dict.fromkeys(name for name, _ in asked)), strict=False)
    return list({_label(*pair): pair for pair in ((name, {**own, **given[name]}) for name, own in asked)}.values())


def _lacks(router: Router, bench: Bench) -> str | None:
    """What a router needs and this bench does not have."""
    lack = first_lack(router, bench.library, bench.library.names)
    if lack is not None:
        return lack[0].lacking
    return DESCRIBED.lacking if DESCRIBED in router.needs and bench.guide is None else None


def _label(name: str, options: Mapping[str, Any]) -> str:
    return ", ".join([name, *(f"{key.replace('top_k', 'k')} {_in_words(value)}" for key, value in options.items())])


def _in_words(value: Any) -> str:
    """A setting for a label: of a router its name, and its settings in brackets."""
    if not isinstance(value, Mapping):
        return str(value)
    inner = [f"{key} {_in_words(one)}" for key, one in value.items() if key != "name"]
    return str(value["name"]) + (f" ({', '.join(inner)})" if inner else "")
