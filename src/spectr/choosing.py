"""From names and settings to a library and routers: what "auto" stands for, and what a router needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectr.errors import (
    CompositionError,
    MissingExtraError,
    SpectrError,
    collecting,
    raise_together,
    some_of,
)
from spectr.library import ExpertLibrary
from spectr.routers import Router, check_needs, get_router, residents
from spectr.routers.options import options_of, read_settings
from spectr.shipped import open_library

if TYPE_CHECKING:
    from spectr.composed_model import Settings

_MANY = 64  # experts, beyond which "auto" reads them from disk as prompts call for them


@dataclass(frozen=True, kw_only=True)
class RoutingRequest:
    """A library and routers by name.

    Attributes:
        model: The base model, or a composed folder, whose library and router are then the defaults.
        library: Folder of the experts; the shipped ones by default.
        routers: Names; "auto" is the one that suits the library.
        settings: Texts, as :func:`spectr.routers.options.read_settings` takes them.
        allow: Experts that may be chosen; all by default.
        token_level: "auto" is a router that decides for each token, as vLLM needs.
    """

    model: str | None = None
    library: Path | None = None
    routers: Sequence[str] = ("auto",)
    settings: Sequence[str] = ()
    allow: Sequence[str] | None = None
    token_level: bool = False

    def resolve(self) -> ResolvedRouting:
        """Open the library and make the routers; all problems are raised at once.

        Raises:
            SpectrError: A name or a setting is unknown, a value is out of range, or the library lacks what a router
                needs.
        """
        folder = open_composed(self.model)
        if folder is not None and self.library is None:
            library = folder.open_library(str(self.model))
        else:
            library = open_library(self.library)
        auto = self._auto(library, folder)
        names = [auto["name"] if name == "auto" else name for name in self.routers]
        check_names(names)
        defaults = {name: {} for name in names}
        if "auto" in self.routers:
            defaults[auto["name"]] = {key: value for key, value in auto.items() if key != "name"}
        routers = make_routers(names, self.settings, library, defaults=defaults, allow=self.allow)
        remarks = self._remarks(library, auto["name"]) if "auto" in self.routers and folder is None else []
        remarks += filter(None, (self._takes_all(router, library) for router in routers.values()))
        return ResolvedRouting(library, routers, remarks)

    def _auto(self, library: ExpertLibrary, folder: Settings | None) -> Mapping[str, Any]:
        """The router that "auto" stands for, with its settings."""
        if folder is not None:
            return folder.router
        if self.token_level:
            return {"name": "calibrated-token" if _is_calibrated(library) else "spectr"}
        if not _is_calibrated(library):
            return {"name": "spectr"}
        if len(library) > _MANY and all(map(library.indexed, library)):
            return {"name": "shortlist", "size": 1}
        return {"name": "calibrated"}

    def _remarks(self, library: ExpertLibrary, name: str) -> list[str]:
        if self.token_level:
            return [f"router: {name}, token by token, as vLLM routes; another by --router"]
        new = [expert for expert in library if not library.calibrated(expert)]
        if not new:
            return []
        return [
            f"router: spectr, token by token, as {some_of(new, 3)} {'is' if len(new) == 1 else 'are'} not calibrated; "
            f"for the far better one: spectr library calibrate --library {library.origin}"
        ]

    def _takes_all(self, router: Router, library: ExpertLibrary) -> str | None:
        there, k = len(self.allow or library), router.selection.k or 0
        if not 1 < k >= there:
            return None
        return f"{'all' if there > 1 else 'one'} of {there} work on every token: the router takes up to {k}"


@dataclass(frozen=True)
class ResolvedRouting:
    """The library and the routers of a :class:`RoutingRequest`, checked against each other.

    Attributes:
        library: The experts.
        routers: By name, in the order of the request.
        remarks: What a user might not expect.
    """

    library: ExpertLibrary
    routers: Mapping[str, Router]
    remarks: Sequence[str] = ()

    @property
    def router(self) -> Router:
        """The first router; the default one where a server has several."""
        return next(iter(self.routers.values()))


def open_composed(model: str | None) -> Settings | None:
    """How a composed folder is routed; ``None`` for any other model."""
    if model is None or not (Path(model) / "config.json").is_file():
        return None
    try:
        from spectr.composed_model import Settings
        from spectr.models.load import composed_config
    except ImportError as error:
        raise MissingExtraError("running a model", "models") from error
    known = composed_config(model)
    return Settings.of(known) if known else None


def check_names(names: Sequence[str]) -> None:
    """Raise :class:`CompositionError` for a router that is named twice, or several in one text."""
    for name in names:
        if "," in name:
            raise CompositionError(
                f"--router {name}", do=f"name each by itself: --router {name.replace(',', ' --router ')}"
            )
        if names.count(name) > 1:
            raise CompositionError(f"--router {name} twice", expected="each router once", do="leave one out")


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
    raise_together(title, problems_of(options_of, names))
    given = read_settings(texts, names, defaults=defaults)
    made: dict[str, Router] = {}

    def make(name: str) -> None:
        router = _made(name, {**defaults[name], **given[name]}, library, fits="top_k" not in given[name])
        residents(router, library.names)
        library.check(*(allow or []))
        check_needs(router, library, allow or library.names)
        made[name] = router

    raise_together(title, problems_of(make, names))
    return made


def _made(name: str, options: Mapping[str, Any], library: ExpertLibrary, *, fits: bool) -> Router:
    """A router whose ``top_k``, where it ``fits`` itself to the library, is at most the number of experts."""
    if name == "oracle" and "expert" not in options:
        raise CompositionError(
            "router 'oracle' needs expert: the one that it always takes",
            expected=f"one of {', '.join(library)}",
            do="-r oracle -e NAME",
        )
    if name == "shortlist" and options.get("size") == 1 and "token_router" in options:
        raise CompositionError(
            "a shortlist of one leaves nothing to choose: token_router and its settings make no difference",
            do="leave them out, or ask for a longer one: --set size=16",
        )
    router = get_router(name, **options)
    return fit_to(len(library), router) if fits else router


def fit_to(experts: int, router: Router) -> Router:
    """The router, which takes at most this number of experts."""
    settable = {field.name for field in dataclasses.fields(router)} if dataclasses.is_dataclass(router) else ()
    if (router.selection.k or 0) <= experts or "top_k" not in settable:
        return router
    return dataclasses.replace(router, top_k=experts)  # pyright: ignore[reportArgumentType]


def _is_calibrated(library: ExpertLibrary) -> bool:
    return all(map(library.calibrated, library))


def problems_of(check: Callable[[str], Any], names: Iterable[str]) -> list[SpectrError]:
    """What a check raises for each of these names."""
    found: list[SpectrError] = []
    for name in names:
        with collecting(found):
            check(name)
    return found
