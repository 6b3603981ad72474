"""Objects by name: ours from a table, other packages' by entry point. Nothing is imported before its first use."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, NamedTuple, TypeVar

from spectr.errors import SpectrError, SpectrWarning, did_you_mean

T = TypeVar("T")
PROTOCOL = 1  # version of the objects that packages add; 1 if an object declares none


class Entry(NamedTuple):
    """Where a maker is, and the options that the name implies."""

    target: str
    preset: Mapping[str, Any]


def entry(target: str, **preset: Any) -> Entry:
    """``entry("spectr.routers.spectr:Spectr", combine="factors")``: a module's attribute, with some options.

    An option that is an entry itself stands for the object that it makes.
    """
    return Entry(target, preset)


@dataclass(frozen=True, kw_only=True, eq=False)
class Registry(Generic[T]):
    """Makers of ``T`` by name. To add a name, add a line to ``entries``; another package declares an entry point.

    An entry point's object may have an attribute ``spectr_protocol: ClassVar[int]``, the version of the protocol that
    it implements (default 1). If it differs from ``protocol``, ``adapters`` adapts the object, or it is refused.

    Attributes:
        kind: The name of ``T`` in messages, such as "router".
        group: The group of the entry points.
        entries: By name a maker, ``"module:attribute"`` or :func:`entry`. These take precedence over entry points.
        error: Type of the errors.
        protocol: The version that callers of this registry expect.
        adapters: By older version, a function that turns a maker of that version into one of ``protocol``.
        old_group: The group's former name, which still works, with a warning.
        as_text: How the command line writes a name with options such as "density=..."; ``None`` if it cannot.
    """

    kind: str
    group: str
    entries: Mapping[str, str | Entry]
    error: type[SpectrError] = SpectrError
    protocol: int = PROTOCOL
    adapters: Mapping[int, Callable[[Any], Any]] = field(default_factory=dict)
    old_group: str | None = None
    as_text: Callable[[str, list[str]], str] | None = None

    def names(self) -> tuple[str, ...]:
        """All names in alphabetical order; imports nothing."""
        return tuple(sorted({*self.entries, *(point.name for point in self._points())}))

    def load(self, name: str) -> Callable[..., T]:
        """The maker of this name.

        Raises:
            SpectrError: The name is unknown, or its package is broken or implements another version; of type ``error``.
        """
        found = self.entries.get(name)
        if found is None:
            return self._load_plugin(name)
        if point := self._hidden.pop(name, None):
            warnings.warn(
                f"the {self.kind} '{name}' of {_origin(point)} is ignored, since {name} is built in; rename that one",
                SpectrWarning,
                stacklevel=3,
            )
        return _maker(found)

    def make(self, name: str, **options: Any) -> T:
        """Make the object of this name with these options.

        Raises:
            SpectrError: See :meth:`load`; or an option is unknown or missing. Of type ``error``.
        """
        make = self.load(name)
        parameters = signature(make).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        strange = [] if open_ended else [option for option in options if option not in parameters]
        if strange:
            raise self.error(
                f"{self.kind} '{name}' has no {' and no '.join(strange)}",
                expected=f"some of: {', '.join(parameters)}" if parameters else "no settings",
                do=did_you_mean(strange[0], parameters) if parameters else "remove it",
            )
        fixed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in fixed]
        missing = [option for option in needed if option not in options]
        if missing:
            given = [f"{option}=..." for option in missing]
            raise self.error(
                f"{self.kind} '{name}' needs {' and '.join(missing)}",
                do=(f"{self.as_text(name, given)}, or " if self.as_text else "") + f"in Python {', '.join(given)}",
            )
        try:
            return make(**options)
        except Exception as error:
            if name in self.entries or isinstance(error, SpectrError):
                raise
            raise self.error(
                f"{self.described(name)} cannot be made: {type(error).__name__}: {error}",
                do="check its settings, or repair or uninstall the package",
            ) from error

    def described(self, name: str) -> str:
        """The name that a package adds, with that package, for messages."""
        return f"the {self.kind} '{name}' of {next(_origin(point) for point in self._points() if point.name == name)}"

    @cached_property
    def _hidden(self) -> dict[str, EntryPoint]:
        """Entry points with a built-in name, until a warning names them; looked up once."""
        return {point.name: point for point in entry_points(group=self.group) if point.name in self.entries}

    def _points(self) -> list[EntryPoint]:
        points = list(entry_points(group=self.group))
        for point in entry_points(group=self.old_group) if self.old_group else ():
            warnings.warn(
                f"{point.value}: the entry-point group {self.old_group} is now {self.group}; the next version will not "
                "read the old one",
                SpectrWarning,
                stacklevel=4,
            )
            points.append(point)
        return points

    def _load_plugin(self, name: str) -> Callable[..., T]:
        points = [point for point in self._points() if point.name == name]
        if not points:
            raise self.error(f"unknown {self.kind} '{name}'", do=did_you_mean(name, self.names()))
        if len({point.value for point in points}) > 1:
            raise self.error(
                f"several packages add the {self.kind} '{name}': {', '.join(map(_origin, points))}",
                do="uninstall all but one",
            )
        what = self.described(name)
        try:
            found = points[0].load()
        except Exception as error:
            raise self.error(
                f"{what} cannot be imported: {type(error).__name__}: {error}", do="repair or uninstall the package"
            ) from error
        try:
            inspect.signature(found)
        except (TypeError, ValueError) as error:
            raise self.error(
                f"{what} cannot be called: {error}",
                expected="a class or a function with named parameters",
                do="repair or uninstall the package",
            ) from error
        version = getattr(found, "spectr_protocol", 1)
        if version == self.protocol:
            return found
        if version in self.adapters:
            return self.adapters[version](found)
        readable = ", ".join(map(str, sorted({*self.adapters, self.protocol})))
        raise self.error(
            f"{what} implements version {version} of the plugin protocol",
            expected=f"version {readable}",
            do="update spectr-lora, or install another version of the package",
        )


def signature(make: Callable[..., Any]) -> inspect.Signature:
    """The signature, read once: composing asks for it at every layer."""
    try:
        return _signature(make)
    except TypeError:  # an object without a hash
        return inspect.signature(make)


_signature = lru_cache(maxsize=256)(inspect.signature)


def _maker(found: str | Entry) -> Callable[..., Any]:
    target, preset = (found, {}) if isinstance(found, str) else found
    module, _, attribute = target.partition(":")
    make = getattr(import_module(module), attribute)
    given = {name: _maker(value)() if isinstance(value, Entry) else value for name, value in preset.items()}
    return partial(make, **given) if given else make


def _origin(point: EntryPoint) -> str:
    """The package of an entry point, if known."""
    return f"{point.dist.name} {point.dist.version} ({point.value})" if point.dist else point.value
