"""Faults of a policy or a request by field, found by pydantic, in our own words.

The ``description`` of each field states what is expected. A field that must not be shown has ``repr=False``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from spectr.errors import did_you_mean

Path = tuple[str | int, ...]
_LONGEST = 60  # shown characters of a value


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        place: Such as ``keys[1].experts``; empty for the whole.
        found: What is wrong there.
        expected: What would be right.
    """

    place: str
    found: str
    expected: str | None


def faults(model: type[BaseModel], given: Any, error: ValidationError) -> list[Fault]:
    """All faults in the order of the fields: for each field one, the most deeply nested.

    Args:
        model: The expected model.
        given: The data.
        error: Pydantic's error.
    """
    found = [_Found(model, given, fault) for fault in error.errors(include_url=False)]
    kept: list[_Found] = []
    for one in sorted(found, key=lambda one: -len(one.path)):
        if not any(other.path[: len(one.path)] == one.path or other.of == one.of for other in kept):
            kept.append(one)
    return [one.fault() for one in found if one in kept]


class _Found:
    """A pydantic error, and its place in the data.

    Attributes:
        path: The place.
        of: The place of the field that it belongs to.
    """

    def __init__(self, model: type[BaseModel], given: Any, fault: Any):
        self.kind, self.input, self.context = fault["type"], fault["input"], fault.get("ctx", {})
        self.path: Path = ()
        self.of: Path = ()
        self.model, self.field = model, None
        for part in fault["loc"]:
            if not _leads_on(part, given, self.model):
                continue
            self.path = (*self.path, part)
            field = _names(self.model).get(part)
            if field is not None or self.field is None or any(_models(self.field.annotation)):
                self.of = self.path
            if field is not None:
                self.field, self.model = field, next(_models(field.annotation), self.model)
            given = given.get(part) if isinstance(given, dict) else given[part]

    def fault(self) -> Fault:
        """The fault in our own words."""
        found, expected = self._words()
        return Fault(place="".join(map(_step, self.path)).removeprefix("."), found=found, expected=expected)

    def _words(self) -> tuple[str, str | None]:
        fields = list(_names(self.model))
        if self.kind == "extra_forbidden":
            return "is not a field", did_you_mean(str(self.path[-1]), map(str, fields))
        if self.kind == "value_error":
            found, *expected = self.context["error"].args
            return found, expected[0] if expected else None
        if self.kind in ("model_type", "model_attributes_type"):
            return f"is {_kind(self.input)}", f"fields: {', '.join(map(str, fields))}"
        assert self.field is not None
        if self.kind == "missing":
            return "is missing", self.field.description
        found = shown(self.input) if self.field.repr else _kind(self.input)
        return f"is {found}", self.field.description


def _leads_on(part: str | int, given: Any, model: type[BaseModel]) -> bool:
    """Whether a part of pydantic's place belongs to the data, not to the types that a value may have."""
    if isinstance(part, int):
        return isinstance(given, (list, tuple))
    return isinstance(given, dict) and (part in given or part in _names(model))


def _step(part: str | int) -> str:
    if isinstance(part, int):
        return f"[{part}]"
    shows = part.isidentifier() or len(part) < 8  # else it may be an API key in the wrong place
    return f".{part}" if shows else ".(a name that is not shown)"


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return f"a text of {len(value)} characters"
    if value in ([], {}, None):
        return "empty"
    kinds = {dict: "a mapping", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "of another type")


def shown(value: Any) -> str:
    """A value as JSON, shortened if it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _names(model: type[BaseModel]) -> dict[str | int, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
