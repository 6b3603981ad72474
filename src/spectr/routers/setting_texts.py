"""Settings of routers as texts, ``name=value``. Names, types and defaults come from the router's fields.

Another package's router only needs typed fields, or a function with typed parameters.
"""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import partial
from inspect import formatannotation
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from spectr.errors import CompositionError, nearest
from spectr.registry import Registry
from spectr.renamed import current_options
from spectr.routers.hints import Unresolved, hints_of, kinds
from spectr.routers.registries import PARTS, ROUTERS, part_of
from spectr.routers.router import Router
from spectr.routers.router_config import part_config

_NONE = type(None)
_DETAILED = 3  # a message lists the defaults of this many routers at most
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class Option(NamedTuple):
    """One setting: its type, and its default (``inspect.Parameter.empty`` if it has none)."""

    hint: Any
    default: Any

    @property
    def part(self) -> type | None:
        """The kind of value if it has settings itself: a router, evidence or a use."""
        return part_of(self.hint)


def options_of(name: str, kind: type = Router) -> dict[str, Option]:
    """The settings of a router, evidence or use by name.

    Raises:
        CompositionError: The name is unknown.
    """
    make = PARTS[kind].load(name)
    hints, made = hints_of(make), _factory_defaults(make)
    parameters = inspect.signature(make).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {p.name: Option(hints.get(p.name, Any), made.get(p.name, p.default)) for p in named}


def read_settings(
    texts: Sequence[str],
    routers: Sequence[str],
    *,
    defaults: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    strict: bool = True,
) -> dict[str, dict[str, Any]]:
    """The settings of each router, from texts to options of :func:`spectr.get_router`: plain data.

    ``temperature=2`` applies to every router with this setting; ``arrow.temperature=2`` applies to one router and takes
    precedence. A setting that a router lacks is applied to the router inside it, if that has it;
    ``token_router.top_k=2`` is the full form. The same holds for evidence and uses.

    Args:
        texts: Texts of the form ``NAME=VALUE``.
        routers: Names of the routers.
        defaults: Settings by router that texts override; a setting of the router inside one changes that router.
        strict: Whether a setting that no router has is an error.

    Raises:
        CompositionError: A text has another form or is repeated, no router has the setting, or its type is wrong.
    """
    given = [_split(text) for text in texts]
    twice = sorted(key for key, count in Counter(key for key, _ in given).items() if count > 1)
    if twice:
        raise CompositionError(f"{' and '.join(twice)} set twice", expected="each setting once", do="remove one")
    names = {f"{name}." for name in (*routers, *ROUTERS.names())} if any("." in key for key, _ in given) else set()
    general = {key: text for key, text in given if not key.startswith(tuple(names))}
    found: dict[str, dict[str, Any]] = {}
    placed: set[str] = set()
    for name in routers:
        own = f"{name}."
        addressed = {key.removeprefix(own): text for key, text in given if key.startswith(own)}
        found[name], used = _settled(name, {**general, **addressed}, defaults.get(name, {}))
        placed |= used | {own + key for key in used & set(addressed)}
    for key in [key for key, _ in given if key not in placed] if strict else ():
        _refuse(key, routers)
    return found


def _settled(
    name: str, texts: Mapping[str, str], defaults: Mapping[str, Any], kind: type = Router
) -> tuple[dict[str, Any], set[str]]:
    """Options of one router, evidence or use, and which of the given names apply to it."""
    known = options_of(name, kind)
    as_given = current_options(PARTS[kind].load(name), {key: key for key in texts})
    given = {key: texts[old] for key, old in as_given.items()}
    settled = {key: parse(text, known[key].hint, key) for key, text in given.items() if key in known}
    used = set(settled)
    for place, part in [(key, option.part) for key, option in known.items() if option.part is not None]:
        within = {key: text for key, text in given.items() if key not in known and "." not in key}
        within |= {k.removeprefix(f"{place}."): text for k, text in given.items() if k.startswith(f"{place}.")}
        inner = settled.get(place, defaults.get(place, known[place].default))
        if not within or not isinstance(inner, (Mapping, part)):
            continue
        inner = inner if isinstance(inner, Mapping) else part_config(inner)
        more, took = _settled(inner["name"], within, inner, part)
        if more:
            settled[place] = {**inner, **more}
        used |= took & set(given) | {f"{place}.{key}" for key in took}
    return settled, {as_given[key] for key in used if key in as_given}


def parse(text: str, hint: Any, name: str) -> Any:
    """Parse a value of this type.

    Args:
        text: The text.
        hint: A field's type: int, float, bool, str, Path, an Enum (a member's name or value), a Literal, a router's
            name, a tuple, list or Sequence of these (with commas), a union of them, or None ("none"). Any takes a
            Python literal, else the text.
        name: Name of the setting, for messages.

    Raises:
        CompositionError: The text is not such a value, or no text can be one.
    """
    parsers = {kind: parser for kind in kinds(hint) if (parser := _parser(kind, name))}
    for parser in parsers.values():
        try:
            return parser(text)
        except (ValueError, SyntaxError, KeyError) as error:
            if isinstance(error, CompositionError):
                raise
    if len(parsers) < len(kinds(hint)):
        reason = f"cannot be resolved: {hint.cause}" if isinstance(hint, Unresolved) else f"is {formatannotation(hint)}"
        raise CompositionError(f"{name} cannot be set from text: its type {reason}", do="set it in Python")
    raise CompositionError(f"{name}={text}", expected=" or ".join(map(_in_words, parsers)))


def _parser(kind: Any, name: str) -> Callable[[str], Any] | None:
    """A function that parses a text as this type; ``None`` if no text can represent such a value."""
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return {**{str(member.value): member for member in kind}, **kind.__members__}.__getitem__
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {str(value): value for value in parts}.__getitem__
    if origin not in _SEVERAL:
        part = part_of(kind)
        return _PARSERS.get(kind) if part is None else partial(_named, PARTS[part])
    if not parts or any(_parser(one, name) is None for part in parts if part is not ... for one in kinds(part)):
        return None

    def several(text: str) -> Any:
        texts = [part.strip() for part in text.split(",") if part.strip()]
        hints = parts if _is_fixed(kind) else parts[:1] * len(texts)
        return _SEVERAL[origin](parse(one, part, name) for one, part in zip(texts, hints, strict=True))

    return several


def _is_fixed(kind: Any) -> bool:
    """Whether the type is a tuple of a known length."""
    return get_origin(kind) is tuple and get_args(kind)[1:] != (...,)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _named(registry: Registry[Any], text: str) -> dict[str, Any]:
    registry.load(text)
    return {"name": text}


_PARSERS: dict[Any, Callable[[str], Any]] = {
    _NONE: lambda text: {"none": None, "": None}[text.lower()],
    bool: lambda text: _BOOLS[text.lower()],
    int: int,
    float: float,
    str: str,
    Path: Path,
    Any: _literal,
}
_SEVERAL: dict[Any, Callable[..., Any]] = {tuple: tuple, list: list, Sequence: tuple}


def _in_words(kind: Any) -> str:
    words = {_NONE: "none", bool: "true or false", int: "a whole number", float: "a number"}
    part = part_of(kind)
    if part is not None:
        return f"a {PARTS[part].kind}'s name"
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return " or ".join(kind.__members__)
    if _is_fixed(kind):
        return f"{len(get_args(kind))} values, separated by commas: {', '.join(map(_in_words, get_args(kind)))}"
    if get_origin(kind) in _SEVERAL:
        return f"{_in_words(get_args(kind)[0])}, or several, separated by commas"
    return words.get(kind, "a text")


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name.strip() and equals):
        raise CompositionError(f"--set {text}", expected="NAME=VALUE, such as temperature=0.5")
    place, dot, last = name.strip().rpartition(".")
    return place + dot + last.replace("-", "_"), value.strip()


def _refuse(key: str, routers: Sequence[str]) -> None:
    """Raise an error: no router has this setting."""
    first, dot, rest = key.partition(".")
    if dot and first in ROUTERS.names() and first not in routers:
        raise CompositionError(
            f"--set {key}: the router {first} is not used here", expected=f"one of {', '.join(routers)}"
        )
    among, name = ([first], rest) if dot and first in routers else (list(routers), key)
    known = list(dict.fromkeys(named for router in among for named, _ in _all_of(router)))
    near = nearest(name, known)
    if len(among) > _DETAILED:
        expected = f"one of {', '.join(known)}"
    else:
        shown = [f"{router}: {', '.join(_shown(router)) or 'none'}" for router in among]
        expected = f"one of these settings (with their defaults): {'; '.join(shown)}"
    raise CompositionError(
        f"router '{among[0]}' has no {name}" if len(among) == 1 else f"none of these routers has {name}",
        expected=expected,
        do="-r oracle -e NAME, or --allow NAME" if name == "expert" else near and f"did you mean '{near}'?",
    )


def _shown(router: str) -> list[str]:
    empty = inspect.Parameter.empty
    return [name if value is empty else f"{name}={_as_text(value)}" for name, value in _all_of(router)]


def _all_of(name: str, prefix: str = "", kind: type = Router) -> Iterator[tuple[str, Any]]:
    """The settings of a router and of its parts, with their defaults."""
    for key, option in options_of(name, kind).items():
        part = option.part
        inner = part_config(option.default) if part is not None and isinstance(option.default, part) else None
        yield prefix + key, inner["name"] if inner else option.default
        if part is not None and inner:
            yield from _all_of(inner["name"], f"{prefix}{key}.", part)


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _factory_defaults(make: Callable[..., Any]) -> dict[str, Any]:
    """Defaults that a dataclass creates for each object, if the name does not stand for another value."""
    source, preset = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    if not is_dataclass(source):
        return {}
    made = [(f.name, f.default_factory) for f in fields(source) if f.default_factory is not MISSING]
    return {name: factory() for name, factory in made if name not in preset}
