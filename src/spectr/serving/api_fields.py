"""The accepted requests with our own fields, and our field in answers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from spectr.errors import nearest
from spectr.serving.api_errors import Fault, RefusalError, faults, shown
from spectr.serving.engines.engine import Step, Ticket

OURS = ("experts", "router", "return_routing")
_DIGITS = 3

_COUNT, _PENALTY = "a whole number, at least 1", "a number from -2 to 2"
_ELSEWHERE = {  # fields of other requests
    "messages": "send it to /v1/chat/completions, or write one text as 'prompt'",
    "prompt": "send it to /v1/completions, or write turns as 'messages'",
    "extra_body": "extra_body is an argument of OpenAI's client; send its fields next to the others",
}
_SLIP = 0.81  # similarity of names; ``top_k``, a field of other servers, is not a misspelt ``top_p``
Number = StrictFloat | StrictInt
Text = Annotated[StrictStr, Field(min_length=1)]


def _field(expected: str, default: Any = ...) -> Any:
    return Field(default, description=expected)


class StreamOptions(BaseModel):
    """Options of a stream. Streams are never padded, so that there is no obfuscation to omit."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool | None = _field("true or false", None)
    include_obfuscation: StrictBool | None = _field("true or false", None)


class Request(BaseModel):
    """Fields of both endpoints; other fields go to the engine unchanged.

    Attributes:
        experts: Allow-list; restricts the key's experts.
        router: One of the served routers.
        return_routing: ``true``: each token's shares; ``"layers"``: also each layer's decision.
    """

    model_config = ConfigDict(extra="allow")

    model: StrictStr = _field("a name that GET /v1/models lists")
    stream: StrictBool | None = _field("true or false", None)
    stream_options: StreamOptions | None = _field('an object: {"include_usage": true}', None)
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = _field(_COUNT, None)
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = _field(_COUNT, None)
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = _field("a number from 0 to 2", None)
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = _field("a number above 0, at most 1", None)
    n: Annotated[StrictInt, Field(ge=1)] | None = _field(_COUNT, None)
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = _field("a whole number of 64 bits", None)
    stop: Text | list[Text] | None = _field("a text, or a list of texts, none of them empty", None)
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = _field(_PENALTY, None)
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = _field(_PENALTY, None)
    logit_bias: dict[StrictStr, Number] | None = _field("an object with numbers by token, {TOKEN: BIAS}", None)
    experts: Annotated[list[StrictStr], Field(min_length=1)] | None = _field(
        "a list with the name of at least one expert; by default all that the key may use", None
    )
    router: StrictStr | None = _field("a router's name", None)
    return_routing: StrictBool | Literal["layers"] = _field('true, false or "layers"', False)

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream", True):
            raise ValueError("is for streams only", "\"stream\": true as well, or no 'stream_options'")
        return value


class Part(BaseModel):
    """One part of a turn's content."""

    model_config = ConfigDict(extra="allow")

    type: StrictStr = _field('the kind of this part, "text"')
    text: StrictStr | None = _field("a text", None)

    @model_validator(mode="after")
    def _has_text(self) -> Part:
        if self.type == "text" and self.text is None:
            raise ValueError("has no text", '{"type": "text", "text": "..."}')
        return self


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: StrictStr = _field('"system", "user" or "assistant"')
    content: StrictStr | list[Part] | None = _field('a text, or a list of parts: {"type": "text", "text": "..."}', None)

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":  # whose turn may consist of a tool call
            raise ValueError("has no content", f'{{"role": "{self.role}", "content": "..."}}')
        return self


class ChatRequest(Request):
    """A request to ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)] = _field(
        'a list with at least one turn: {"role": "user", "content": "..."}'
    )


class CompletionRequest(Request):
    """A request to ``/v1/completions``."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]] = _field(
        "a text, a list of texts, or a list of token ids"
    )


def parse(kind: type[Request], body: bytes, known: frozenset[str] = frozenset()) -> tuple[Request, dict[str, Any]]:
    """Check a request's body. Returns it as a model, and as it is without our own fields.

    Args:
        kind: The model.
        body: JSON.
        known: Further fields that the engine knows.

    Raises:
        RefusalError: 400: the body is not a JSON object, or a field is misspelt, missing or of the wrong type.
    """
    if not body.strip():
        raise _no_json("empty")
    try:
        raw = json.loads(body)
        json.dumps(raw, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _no_json(f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except UnicodeEncodeError as error:
        raise _no_json(f"not valid Unicode: {error.object[error.start]!a} is half a character", "Unicode") from None
    except (ValueError, RecursionError):
        raise _no_json("not JSON") from None
    if not isinstance(raw, dict):
        raise _no_json(f"{shown(raw)}, not an object")
    _check_spelling(raw, (known - frozenset(_ELSEWHERE)) | frozenset(kind.model_fields))
    try:
        request = kind.model_validate(raw)
    except ValidationError as error:
        raise _refusal(faults(kind, raw, error)) from None
    return request, {key: value for key, value in raw.items() if key not in OURS}


def _no_json(found: str, expected: str = 'a JSON object, such as {"model": "spectr", ...}') -> RefusalError:
    return RefusalError(f"the body is {found}", expected=expected, code="invalid_json")


def _check_spelling(raw: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raise :class:`RefusalError` for fields that look like known ones. An engine may ignore unknown fields, and
    ``expert`` instead of ``experts`` would then widen the set of experts."""
    meant = {name: _meant(name, known) for name in raw if name not in known}
    slips = [f"'{name}' is not a field of this request\n  to do: {do}" for name, do in meant.items() if do]
    if slips:
        param = next(name for name, do in meant.items() if do)
        raise RefusalError("\nalso: ".join(slips), code="invalid_value", param=param)


def _meant(name: str, known: frozenset[str]) -> str | None:
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    near = nearest(name, sorted(known), likeness=_SLIP)
    return f"use '{near}' if you mean that, or remove the field" if near else None


def _refusal(found: Sequence[Fault]) -> RefusalError:
    first, *more = [f"'{fault.place}' {fault.found}; expected: {fault.expected}" for fault in found]
    param = re.split(r"[.\[]", found[0].place)[0]
    return RefusalError("\n".join((first, *(f"also: {fault}" for fault in more))), code="invalid_value", param=param)


def routing(ticket: Ticket, steps: Sequence[Step], layers: Sequence[str]) -> dict[str, Any]:
    """The ``routing`` field of a choice: for all its tokens, or for those of one chunk.

    Args:
        ticket: The answer names only its experts.
        steps: One per token.
        layers: Names of the routed layers, which the answer has with ``record="layers"`` only.
    """
    place = {name: number for number, name in enumerate(ticket.experts)}
    found: dict[str, Any] = {
        "experts": list(ticket.experts),
        "tokens": [_shares(step.shares, place) for step in steps],
    }
    if (p := next((step.p for step in steps if step.p is not None), None)) is not None:
        found["p"] = round(p, _DIGITS)
    if ticket.record == "layers":
        found["layers"] = list(layers)
        found["by_layer"] = [[_decision(chosen, place) for chosen in step.layers] for step in steps]
    return found


def _shares(shares: Mapping[str, float], place: Mapping[str, int]) -> list[list[float]]:
    rounded = [[place[name], math.floor(share * 10**_DIGITS + 1e-6) / 10**_DIGITS] for name, share in shares.items()]
    return sorted((pair for pair in rounded if pair[1] > 0), key=lambda pair: (-pair[1], pair[0]))


def _decision(chosen: Mapping[str, tuple[float, float]], place: Mapping[str, int]) -> list[list[float]]:
    rows = [[place[name], round(weight, _DIGITS), round(score, 4)] for name, (weight, score) in chosen.items()]
    return sorted(rows, key=lambda row: (-row[1], row[0]))
