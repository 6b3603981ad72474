"""Which modules a configuration targets, by PEFT's rules; a file may hold factors of more modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The part of a LoRA configuration that lists the adapted modules.

    Attributes:
        modules: A regular expression for whole names, ``"all-linear"``, or names and endings of names. ``None`` if the
            configuration names none: then all modules in the file.
        excluded: The same for excluded modules.
        saved: ``modules_to_save``, which have no factors.
        layers: Layer indices; ``None`` for all.
        patterns: What precedes the index in a module's name; empty for anything.
        tied: Whether the output head uses the factors of the embedding that it is tied to (``ensure_weight_tying``).

    Source: PEFT's ``check_target_module_exists``.
    """

    modules: str | frozenset[str] | None = None
    excluded: str | frozenset[str] = frozenset()
    saved: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    patterns: tuple[str, ...] = ()
    tied: bool = False

    @staticmethod
    def of(raw: Mapping[str, Any]) -> Targets:
        """Read a configuration without :func:`target_faults`."""
        modules, layers, patterns = raw.get("target_modules"), raw.get("layers_to_transform"), raw.get("layers_pattern")
        if modules is None and raw.get("target_parameters"):
            modules = ()  # only these
        return Targets(
            modules=modules if modules is None else _names(modules),
            excluded=_names(raw.get("exclude_modules") or ()),
            saved=tuple(raw.get("modules_to_save") or ()),
            layers=None
            if layers is None or layers == []
            else frozenset([layers] if isinstance(layers, int) else layers),
            patterns=(patterns,) if isinstance(patterns, str) and patterns else tuple(patterns or ()),
            tied=bool(raw.get("ensure_weight_tying")),
        )

    @property
    def all_linear(self) -> bool:
        """Whether all linear layers except the output head are targeted."""
        return isinstance(self.modules, str) and self.modules.lower() == ALL_LINEAR

    def has(self, module: str) -> bool:
        """Whether a module is targeted, by its name in the model."""
        if _matches(self.excluded, module) or any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in self.saved):
            return False
        if self.modules is None or self.all_linear:
            return self.layers is None or self._layer(module) in self.layers
        if self.lists(module):  # regardless of its layer
            return True
        return _matches(self.modules, module) and (self.layers is None or self._layer(module) in self.layers)

    def lists(self, module: str) -> bool:
        """Whether a module is targeted by its full name."""
        return isinstance(self.modules, frozenset) and module in self.modules

    def _layer(self, module: str) -> int | None:
        """A module's layer: the first number in its name after one of the patterns."""
        before = [rf"(?:^|.*?\.){pattern}" for pattern in self.patterns] or [r".*?\.[^.]*"]
        found = (re.match(rf"{start}\.(?P<layer>\d+)\.", module) for start in before)
        return next((int(match["layer"]) for match in found if match), None)


def target_faults(raw: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the settings of :class:`Targets`."""
    for key in ("target_modules", "exclude_modules"):
        if (value := raw.get(key)) and not (_is_regex(value) if isinstance(value, str) else _are_texts(value)):
            yield f"{key} is {value!r}"
    layers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern")
    if isinstance(raw.get("target_modules"), str) and (layers is not None or patterns):
        yield "target_modules is a regular expression, and layers_to_transform or layers_pattern is set"
    if layers is not None and not (_is_layer(layers) or (isinstance(layers, list) and all(map(_is_layer, layers)))):
        yield f"layers_to_transform is {layers!r}"
    listed = [patterns] if isinstance(patterns, str) else patterns
    for key, texts in (("layers_pattern", listed), ("modules_to_save", raw.get("modules_to_save"))):
        if texts and not (_are_texts(texts) and all(map(_is_regex, texts))):
            yield f"{key} is {raw[key]!r}"


def _names(value: str | Collection[str]) -> str | frozenset[str]:
    return value if isinstance(value, str) else frozenset(value)


def _matches(names: str | frozenset[str], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def _is_layer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_regex(text: str) -> bool:
    try:
        return re.compile(text) is not None
    except re.error:
        return False
