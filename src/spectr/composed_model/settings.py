"""What a model's ``quantization_config`` says about its experts: all that changes what is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from spectr.errors import CompositionError, did_you_mean, raise_together, range_faults
from spectr.library import ExpertLibrary
from spectr.routers import Router, get_router, residents

METHOD = "spectr"
VERSION = 1
ACCESS = ("open", "closed")
_DERIVED = ("fingerprint",)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a composed folder, or a model that vLLM serves, is routed.

    Everything is in the model's config, and nowhere else: vLLM keeps compiled graphs under a key made of that.

    Attributes:
        library: The experts' folder; a relative path starts from the model's folder.
        router: A router's name and its settings, as :func:`spectr.get_router` takes them.
        access: What a request gets that names no experts: ``"open"`` all of them, ``"closed"`` the base model alone.
        record: Whether the layers keep what they choose, for requests that ask.
        inner: The base model's own ``quantization_config``, where its weights are quantised.
        experts: Those of the library that are there; ``None`` for all of them.
        beside: Further routers, for requests that ask for one of them by its name; in vLLM alone.
    """

    library: str
    router: Mapping[str, Any] = field(default_factory=lambda: {"name": "spectr"})
    access: str = "open"
    record: bool = False
    inner: Mapping[str, Any] | None = None
    experts: Sequence[str] | None = None
    beside: Sequence[Mapping[str, Any]] = ()

    @staticmethod
    def of(config: Mapping[str, Any]) -> Settings:
        """The settings of a ``quantization_config``.

        Raises:
            CompositionError: A key is unknown or missing, a value is out of range, or a later version wrote it.
        """
        known = {f.name for f in fields(Settings)} | {"quant_method", "version", *_DERIVED}
        for key in config:
            if key not in known:
                raise CompositionError(f"quantization_config has the unknown key '{key}'", do=did_you_mean(key, known))
        if config.get("version", VERSION) != VERSION:
            raise CompositionError(
                f"quantization_config is of version {config['version']}",
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
        """Raise :class:`CompositionError` where a value is out of range."""
        checks = (
            ("access", "'open' or 'closed'", ACCESS.__contains__),
            ("record", "true or false", lambda value: isinstance(value, bool)),
            ("experts", "a list of names, or nothing for all", _are_names),
            ("beside", '[{"name": "calibrated"}] or the like', lambda value: not isinstance(value, (str, Mapping))),
        )
        for name, expected, right in checks:
            raise_together("", range_faults(CompositionError, expected, right, **{name: getattr(self, name)}))
        for key, given in (("router", self.router), *(("beside", given) for given in self.beside)):
            if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
                raise CompositionError(f"{key}={given!r}", expected='{"name": "spectr", "top_k": 4} or the like')
            _made(given)
        names = [given["name"] for given in (self.router, *self.beside)]
        if len(set(names)) < len(names):
            raise CompositionError(f"routers {', '.join(names)}", expected="each name once, by which requests ask")

    def make_router(self) -> Router:
        """The router."""
        return _made(self.router)

    def make_routers(self) -> dict[str, Router]:
        """All routers by name, the default first."""
        return {given["name"]: _made(given) for given in (self.router, *self.beside)}

    def open_library(self, model: str | Path) -> ExpertLibrary:
        """The library, whose relative path starts from the model's folder, checked against the router."""
        path = Path(self.library).expanduser()
        library = self.narrowed(ExpertLibrary.open(path if path.is_absolute() else _folder(str(model), path)))
        residents(self.make_router(), library.names)
        return library

    def narrowed(self, library: ExpertLibrary) -> ExpertLibrary:
        """A library with the settings' experts alone."""
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
        kept["beside"] = list(self.beside) or None
        return {"quant_method": METHOD, "version": VERSION, **{k: v for k, v in kept.items() if v is not None}}


def _are_names(value: Any) -> bool:
    return not isinstance(value, str) and all(isinstance(name, str) for name in value)


def _made(config: Mapping[str, Any]) -> Router:
    return get_router(config["name"], **{key: value for key, value in config.items() if key != "name"})


def _folder(model: str, path: Path) -> Path:
    """The library inside a model's folder, or of a model on the Hub."""
    if Path(model).is_dir():
        return Path(model) / path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=f"{path.as_posix()}/**")) / path
