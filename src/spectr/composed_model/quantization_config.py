"""The ``quantization_config`` of a model with experts: everything that changes what is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from spectr.composition.base_checks import compare_texts
from spectr.errors import CompositionError, did_you_mean, raise_together, range_faults
from spectr.library import ExpertLibrary
from spectr.renamed import current_options, options_renamed
from spectr.routers import Router, get_router, residents

METHOD = "spectr"
VERSION = 1
ACCESS = ("open", "closed")
_DERIVED = ("fingerprint",)


@options_renamed(beside="other_routers")
@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a composed folder, or a model in vLLM, is routed.

    All of it is in the model's config, since vLLM caches compiled graphs under a key made from the config.

    Attributes:
        library: The experts' folder; a relative path starts at the model's folder.
        router: A router's name and settings, for :func:`spectr.get_router`.
        access: What a request that names no experts gets: ``"open"`` all experts, ``"closed"`` the base model alone.
        record: Whether layers record their choices, for requests that ask for them.
        inner: The base model's own ``quantization_config`` if its weights are quantised.
        experts: The experts of the library that are used; ``None`` for all.
        other_routers: Further routers, which requests choose by name; in vLLM only.
    """

    library: str
    router: Mapping[str, Any] = field(default_factory=lambda: {"name": "spectr"})
    access: str = "open"
    record: bool = False
    inner: Mapping[str, Any] | None = None
    experts: Sequence[str] | None = None
    other_routers: Sequence[Mapping[str, Any]] = ()

    @staticmethod
    def of(config: Mapping[str, Any]) -> Settings:
        """The settings of a ``quantization_config``.

        Raises:
            CompositionError: A key is unknown or missing, a value is out of range, or a later version wrote it.
        """
        config = current_options(Settings, config, warn=False)
        known = {f.name for f in fields(Settings)} | {"quant_method", "version", *_DERIVED}
        for key in config:
            if key not in known:
                raise CompositionError(f"quantization_config has an unknown key '{key}'", do=did_you_mean(key, known))
        if config.get("version", VERSION) != VERSION:
            raise CompositionError(
                f"quantization_config has version {config['version']}",
                expected=f"version {VERSION}",
                do="update spectr",
            )
        if not isinstance(config.get("library"), str):
            raise CompositionError(
                f"quantization_config has library={config.get('library')!r}",
                expected="the path of a folder of experts",
                do='{"quant_method": "spectr", "library": "/path/to/library", "router": {"name": "spectr"}}',
            )
        settings = Settings(**{f.name: config[f.name] for f in fields(Settings) if config.get(f.name) is not None})
        settings.check()
        return settings

    def check(self) -> None:
        """Raise :class:`CompositionError` if a value is out of range."""
        checks = (
            ("access", "'open' or 'closed'", ACCESS.__contains__),
            ("record", "true or false", lambda value: isinstance(value, bool)),
            ("experts", "a list of names, or nothing for all", _are_names),
            (
                "other_routers",
                'a list such as [{"name": "calibrated"}]',
                lambda value: not isinstance(value, (str, Mapping)),
            ),
        )
        for name, expected, right in checks:
            raise_together("", range_faults(CompositionError, expected, right, **{name: getattr(self, name)}))
        for key, given in (("router", self.router), *(("other_routers", given) for given in self.other_routers)):
            if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
                raise CompositionError(f"{key}={given!r}", expected='an object such as {"name": "spectr", "top_k": 4}')
            _made(given)
        names = [given["name"] for given in (self.router, *self.other_routers)]
        if len(set(names)) < len(names):
            raise CompositionError(
                f"routers {', '.join(names)}", expected="different names, since requests choose by name"
            )

    def make_router(self) -> Router:
        """The router."""
        return _made(self.router)

    def make_routers(self) -> dict[str, Router]:
        """All routers by name, the default first."""
        return {given["name"]: _made(given) for given in (self.router, *self.other_routers)}

    def open_library(self, model: str | Path) -> ExpertLibrary:
        """Open the library, resolve its path in the model's folder, and check it against the router.

        Raises:
            CompositionError: The router does not fit it, or its experts' tokenizers do not fit the model's.
        """
        path = Path(self.library).expanduser()
        library = self.narrowed(ExpertLibrary.open(path if path.is_absolute() else _folder(str(model), path)))
        residents(self.make_router(), library.names)
        compare_texts(str(model), (library[name] for name in library))
        return library

    def narrowed(self, library: ExpertLibrary) -> ExpertLibrary:
        """A library with only the experts in the settings."""
        if self.experts is None:
            return library
        library.check(*self.experts)
        for name in set(library.names) - set(self.experts):
            library = library.without(name)
        return library

    def as_config(self) -> dict[str, Any]:
        """The ``quantization_config``."""
        kept = {f.name: getattr(self, f.name) for f in fields(Settings)}
        kept["experts"] = None if self.experts is None else list(self.experts)
        kept["other_routers"] = list(self.other_routers) or None
        return {"quant_method": METHOD, "version": VERSION, **{k: v for k, v in kept.items() if v is not None}}


def _are_names(value: Any) -> bool:
    return not isinstance(value, str) and all(isinstance(name, str) for name in value)


def _made(config: Mapping[str, Any]) -> Router:
    return get_router(config["name"], **{key: value for key, value in config.items() if key != "name"})


def _folder(model: str, path: Path) -> Path:
    """The library's folder inside a model's folder, or of a model on the Hub."""
    if Path(model).is_dir():
        return Path(model) / path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=f"{path.as_posix()}/**")) / path
