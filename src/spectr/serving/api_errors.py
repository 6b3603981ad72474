"""Errors in the form of OpenAI's API, and faults of a request or a policy by field, in our own words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from spectr.errors import SpectrError, did_you_mean

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "invalid_request_error"}


class RefusalError(SpectrError):
    """A refused request, with the status and body of the answer.

    Args:
        given: What is wrong.
        code: Machine-readable, such as ``"context_length_exceeded"``.
        param: The field that is wrong.
        status: Status of the answer.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        given: str,
        *,
        code: str,
        param: str | None = None,
        status: int = 400,
        expected: str | None = None,
        do: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(given, expected=expected, do=do)
        self.code, self.param, self.status, self.headers = code, param, status, dict(headers or {})

    @property
    def body(self) -> bytes:
        """The standard body."""
        return error_body(self.status, str(self), self.code, self.param)


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> bytes:
    """A standard error body."""
    return json.dumps({"error": _error(status, message, code, param)}).encode()


def standardised(status: int, body: bytes) -> bytes:
    """An application's error body in the standard form; unchanged if it has that form already.

    Details of the application's own failures (status 500 and above) are not passed on.
    """
    try:
        answer = json.loads(body)
    except ValueError:
        answer = body.decode("utf-8", "replace").strip()
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict) and status < 500:
        return json.dumps({"error": {**_error(status, "", None, None), **answer["error"]}}).encode()
    if unknown := _unknown(answer):
        do = "remove it" if len(unknown) == 1 else "remove them"
        named = ", ".join(f"'{name}'" for name in unknown)
        return error_body(status, f"{named}: not supported by this engine\n  to do: {do}", _code(status), unknown[0])
    return error_body(status, _message(status, answer), _code(status))


def _unknown(answer: Any) -> list[str]:
    """Fields that transformers does not know, from its message."""
    detail = str(answer.get("detail")) if isinstance(answer, dict) else ""
    return sorted(re.findall(r"'([^']*)'", detail.partition("Unexpected fields in the request: ")[2]))


def _message(status: int, answer: Any) -> str:
    if status >= 500:
        return "the engine failed on this request" if status == 500 else "the engine cannot take requests now"
    for key in ("detail", "message", "error"):
        if isinstance(answer, dict) and key in answer:
            answer = answer[key]
    return answer if isinstance(answer, str) and answer else json.dumps(answer)


def _code(status: int) -> str:
    return "engine_error" if status >= 500 else "invalid_request"


def _error(status: int, message: str, code: str | None, param: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {"message": message, "type": kind, "param": param, "code": code}


Place = tuple[str | int, ...]
_LONGEST = 60  # shown characters of a value


def faults(model: type[BaseModel], given: Any, error: ValidationError) -> list[Fault]:
    """All faults in the order of the fields: for each field one, the most deeply nested.

    The ``description`` of each field states what is expected. A field that must not be shown has ``repr=False``.

    Args:
        model: The expected model.
        given: The data.
        error: Pydantic's error.
    """
    found = [Fault(model, given, fault) for fault in error.errors(include_url=False)]
    kept: list[Fault] = []
    for one in sorted(found, key=lambda one: -len(one.path)):
        if not any(other.path[: len(one.path)] == one.path or other.of == one.of for other in kept):
            kept.append(one)
    return [one for one in found if one in kept]


class Fault:
    """A pydantic error in our own words, and its place in the data.

    Attributes:
        place: Such as ``keys[1].experts``; empty for the whole.
        found: What is wrong there.
        expected: What would be right.
        path: The place, part by part.
        of: The place of the field that it belongs to.
    """

    def __init__(self, model: type[BaseModel], given: Any, fault: Any):
        self.kind, self.input, self.context = fault["type"], fault["input"], fault.get("ctx", {})
        self.path: Place = ()
        self.of: Place = ()
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
        self.place = "".join(map(_step, self.path)).removeprefix(".")
        self.found, self.expected = self._words()

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
