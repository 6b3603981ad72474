"""The requests that are taken, with our fields, and the field of ours in answers."""

from __future__ import annotations

import json
import math
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
    model_validator,
)

from spectr.serving.engines.base import Step, Ticket
from spectr.serving.errors import RefusalError

OURS = ("experts", "router", "return_routing")
_DIGITS = 3

Number = StrictFloat | StrictInt


class Request(BaseModel):
    """What both endpoints share; fields that are not named here go to the engine as they are.

    Attributes:
        experts: Allow-list; narrows the key's set.
        router: One of those served.
        return_routing: ``true``: each token's shares; ``"layers"``: also each layer's decision.
    """

    model_config = ConfigDict(extra="allow")

    model: StrictStr
    stream: StrictBool | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[StrictStr, Number] | None = None
    experts: Annotated[list[StrictStr], Field(min_length=1)] | None = None
    router: StrictStr | None = None
    return_routing: StrictBool | Literal["layers"] = False


class Part(BaseModel):
    """One part of a turn's content."""

    model_config = ConfigDict(extra="allow")

    type: StrictStr
    text: StrictStr | None = None

    @model_validator(mode="after")
    def _has_text(self) -> Part:
        if self.type == "text" and self.text is None:
            raise ValueError("a part of type 'text' needs a text")
        return self


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: StrictStr
    content: StrictStr | list[Part] | None = None


class ChatRequest(Request):
    """Of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]


class CompletionRequest(Request):
    """Of ``/v1/completions``."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]


def parse(kind: type[Request], body: bytes) -> tuple[Request, dict[str, Any]]:
    """A request's body, checked; and as it is, less our own fields.

    Raises:
        RefusalError: 400: it is no JSON object, or a field is missing or of the wrong type.
    """
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusalError("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise RefusalError("the body is no JSON object", code="invalid_json")
    try:
        request = kind.model_validate(raw)
    except ValidationError as error:
        raise _refusal(error) from None
    return request, {key: value for key, value in raw.items() if key not in OURS}


def _refusal(error: ValidationError) -> RefusalError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    place = ".".join(map(str, first["loc"]))
    return RefusalError(f"{place}: {first['msg']}", code="invalid_value", param=param)


def routing(ticket: Ticket, steps: Sequence[Step], layers: Sequence[str]) -> dict[str, Any]:
    """The ``routing`` of a choice: of all its tokens, or of those of one chunk.

    Args:
        ticket: Its experts are the names; nobody reads of others.
        steps: One for each token.
        layers: The routed layers' names; told with ``record="layers"`` alone.
    """
    place = {name: number for number, name in enumerate(ticket.experts)}
    told: dict[str, Any] = {
        "experts": list(ticket.experts),
        "tokens": [_shares(step.shares, place) for step in steps],
    }
    if ticket.record == "layers":
        told["layers"] = list(layers)
        told["by_layer"] = [[_decision(chosen, place) for chosen in step.layers] for step in steps]
    return told


def _shares(shares: Mapping[str, float], place: Mapping[str, int]) -> list[list[float]]:
    rounded = [[place[name], math.floor(share * 10**_DIGITS + 1e-6) / 10**_DIGITS] for name, share in shares.items()]
    return sorted((pair for pair in rounded if pair[1] > 0), key=lambda pair: (-pair[1], pair[0]))


def _decision(chosen: Mapping[str, tuple[float, float]], place: Mapping[str, int]) -> list[list[float]]:
    rows = [[place[name], round(weight, _DIGITS), round(score, 4)] for name, (weight, score) in chosen.items()]
    return sorted(rows, key=lambda row: (-row[1], row[0]))
