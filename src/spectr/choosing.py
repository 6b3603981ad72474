"""From names and settings to a library and routers; resolves "auto"."""

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
from spectr.renamed import current_options
from spectr.routers import Router, check_needs, get_router, residents
from spectr.routers.registries import ROUTERS
from spectr.routers.setting_texts import options_of, read_settings
from spectr.shipped import open_library

if TYPE_CHECKING:
    from spectr.composed_model import Settings

_MANY = 64  # with more experts, "auto" reads them from disk when a prompt needs them


@dataclass(frozen=True, kw_only=True)
class RoutingRequest:
    """A library and routers by name.

    Attributes:
        model: The base model, or a composed folder, which then provides library and router by default.
        library: Folder of the experts; by default the shipped ones.
        routers: Names; "auto" takes the router that suits the library.
        settings: Texts for :func:`spectr.routers.setting_texts.read_settings`.
        allow: Experts that may be chosen; by default all.
        token_level: Make "auto" choose a router that decides for each token, as vLLM needs.
    """

    model: str | None = None
    library: Path | None = None
    routers: Sequence[str] = ("auto",)
    settings: Sequence[str] = ()
    allow: Sequence[str] | None = None
    token_level: bool = False

    def resolve(self) -> ResolvedRouting:
        """Open the library and make the routers. All problems are raised together.

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
            own = {key: value for key, value in auto.items() if key != "name"}
            defaults[auto["name"]] = current_options(ROUTERS.load(auto["name"]), own, warn=False)
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
            return [f"router: {name}, which decides for each token, as vLLM needs; choose another with --router"]
        new = [expert for expert in library if not library.calibrated(expert)]
        if not new:
            return []
        return [
            f"router: spectr, for each token, since {some_of(new, 3)} {'is' if len(new) == 1 else 'are'} not "
            f"calibrated; for the more accurate router: spectr library calibrate --library {library.origin}"
        ]

    def _takes_all(self, router: Router, library: ExpertLibrary) -> str | None:
        there, k = len(self.allow or library), router.selection.k or 0
        if not 1 < k >= there:
            return None
        return f"{'all' if there > 1 else 'one'} of {there} are used for every token: the router chooses up to {k}"


@dataclass(frozen=True)
class ResolvedRouting:
    """The library and the routers of a :class:`RoutingRequest`, checked against each other.

    Attributes:
        library: The experts.
        routers: The routers by name, in the order of the request.
        remarks: What may surprise a user.
    """

    library: ExpertLibrary
    routers: Mapping[str, Router]
    remarks: Sequence[str] = ()

    @property
    def router(self) -> Router:
        """The first router, which is a server's default."""
        return next(iter(self.routers.values()))


def open_composed(model: str | None) -> Settings | None:
    """The routing of a composed folder; ``None`` for any other model."""
    if model is None or not (Path(model) / "config.json").is_file():
        return None
    try:
        from spectr.composed_model import Settings
        from spectr.models.base_model import composed_config
    except ImportError as error:
        raise MissingExtraError("running a model", "models") from error
    known = composed_config(model)
    return Settings.of(known) if known else None


def check_names(names: Sequence[str]) -> None:
    """Raise :class:`CompositionError` if a router is named twice, or one text names several."""
    for name in names:
        if "," in name:
            raise CompositionError(
                f"--router {name}", do=f"name each one separately: --router {name.replace(',', ' --router ')}"
            )
        if names.count(name) > 1:
            raise CompositionError(f"--router {name} twice", expected="each router once", do="name each router once")


def make_routers(
    names: Sequence[str],
    texts: Sequence[str],
    library: ExpertLibrary,
    *,
    defaults: Mapping[str, Mapping[str, Any]],
    allow: Sequence[str] | None = None,
) -> dict[str, Router]:
    """Make routers by name, with settings, and check them against the library. All problems are raised together.

    Args:
        names: See :func:`spectr.router_names`.
        texts: Settings, as :func:`spectr.routers.setting_texts.read_settings` reads them.
        library: The experts.
        defaults: Settings by name; the texts override them.
        allow: Experts that may be chosen; by default all.

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
    """A router. If it ``fits`` itself to the library, its ``top_k`` is at most the number of experts."""
    if name == "oracle" and "expert" not in options:
        raise CompositionError(
            "router 'oracle' needs the setting expert, the expert that it always takes",
            expected=f"one of {', '.join(library)}",
            do="-r oracle -e NAME",
        )
    if name == "shortlist" and options.get("size") == 1 and "token_router" in options:
        raise CompositionError(
            "a shortlist of one expert leaves no choice: token_router and its settings have no effect",
            do="omit them, or use a longer shortlist: --set size=16",
        )
    router = get_router(name, **options)
    return fit_to(len(library), router) if fits else router


def fit_to(experts: int, router: Router) -> Router:
    """The router with a ``top_k`` of at most this number of experts."""
    settable = {field.name for field in dataclasses.fields(router)} if dataclasses.is_dataclass(router) else ()
    if (router.selection.k or 0) <= experts or "top_k" not in settable:
        return router
    return dataclasses.replace(router, top_k=experts)  # pyright: ignore[reportArgumentType]


def _is_calibrated(library: ExpertLibrary) -> bool:
    return all(map(library.calibrated, library))


def problems_of(check: Callable[[str], Any], names: Iterable[str]) -> list[SpectrError]:
    """The errors of a check for each of these names."""
    found: list[SpectrError] = []
    for name in names:
        with collecting(found):
            check(name)
    return found
