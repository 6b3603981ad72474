"""From what was asked for to a library and routers: what "auto" stands for, settings, and what a router needs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectr.errors import CompositionError, MissingExtraError, SpectrError, raise_together
from spectr.library import ExpertLibrary
from spectr.routers import Router, check_needs, get_router, residents
from spectr.routers.options import options_of, read_settings

if TYPE_CHECKING:
    from spectr.composed_model import Settings

_MANY = 64  # experts, beyond which "auto" reads them from disk as prompts call for them


def open_composed(model: str | None) -> Settings | None:
    """How a composed folder is routed; ``None`` for any other model."""
    if model is None or not (Path(model) / "config.json").is_file():
        return None
    try:
        from spectr.composed_model import Settings
        from spectr.composed_model.load import is_composed
    except ImportError as error:
        raise MissingExtraError("running a model", "models") from error
    if not is_composed(model):
        return None
    return Settings.of(json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["quantization_config"])


def router_for(library: ExpertLibrary) -> str:
    """The name of the router that "auto" stands for with this library."""
    if not is_calibrated(library):
        return "spectr"
    return "shortlist" if len(library) > _MANY and all(map(library.indexed, library)) else "calibrated"


def token_router_for(library: ExpertLibrary) -> str:
    """As :func:`router_for`, where it has to decide for each token."""
    return "calibrated-token" if is_calibrated(library) else "spectr"


def is_calibrated(library: ExpertLibrary) -> bool:
    """Whether all of its experts are."""
    return all(library.calibrated(name) for name in library)


def make_routers(
    names: Sequence[str],
    texts: Sequence[str],
    library: ExpertLibrary,
    *,
    defaults: Mapping[str, Mapping[str, Any]],
    allow: Sequence[str] | None = None,
) -> dict[str, Router]:
    """Routers by name, with settings, checked against the library; all problems are raised at once.

    Args:
        names: See :func:`spectr.router_names`.
        texts: Settings, as :func:`spectr.routers.options.read_settings` reads them.
        library: The experts.
        defaults: By name settings that the texts win over.
        allow: Experts that may be chosen; all by default.

    Raises:
        SpectrError: A name or a setting is unknown, a value is out of range, or the library lacks what a router needs.
    """
    title = "these routers cannot be used"
    raise_together(title, _problems(options_of, names))
    given = read_settings(texts, names)
    made: dict[str, Router] = {}

    def make(name: str) -> None:
        router = _made(name, {**defaults[name], **given[name]}, None if "top_k" in given[name] else len(library))
        residents(router, library.names)
        library.check(*(allow or []))
        check_needs(router, library, allow or library.names)
        made[name] = router

    raise_together(title, _problems(make, names))
    return made


def _made(name: str, options: Mapping[str, Any], most: int | None) -> Router:
    """A router whose ``top_k``, unless somebody set it, is at most the number of experts."""
    if name == "shortlist" and options.get("size") == 1 and "token_router" in options:
        raise CompositionError(
            "a shortlist of one leaves nothing to choose: token_router and its settings make no difference",
            do="leave them out, or ask for a longer one: --set size=16",
        )
    router = get_router(name, **options)
    if most is not None and (router.selection.k or 0) > most:
        router = dataclasses.replace(router, top_k=most)  # pyright: ignore[reportArgumentType]
    return router


def _problems(check: Callable[[str], Any], names: Sequence[str]) -> list[SpectrError]:
    found = []
    for name in names:
        try:
            check(name)
        except SpectrError as error:
            found.append(error)
    return found
