"""Errors as OpenAI's API tells them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from spectr.errors import SpectrError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "invalid_request_error"}


class RefusalError(SpectrError):
    """A request that is not answered, with the status and the body that say so.

    Args:
        given: What is wrong.
        code: Machine-readable, such as ``"context_length_exceeded"``.
        param: The field of the request that is to blame.
        status: Of the answer.
        headers: Further ones of the answer.
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
    """An application's error body in the standard form; one that has it already stays as it is.

    What a server says of its own failures (status 500 and above) is not passed on.
    """
    try:
        said = json.loads(body)
    except ValueError:
        said = body.decode("utf-8", "replace").strip()
    if isinstance(said, dict) and isinstance(said.get("error"), dict) and status < 500:
        return json.dumps({"error": {**_error(status, "", None, None), **said["error"]}}).encode()
    if unknown := _unknown(said):
        do = "leave it out" if len(unknown) == 1 else "leave them out"
        told = ", ".join(f"'{name}'" for name in unknown)
        return error_body(status, f"{told}: no field that this engine knows\n  to do: {do}", _code(status), unknown[0])
    return error_body(status, _message(status, said), _code(status))


def _unknown(said: Any) -> list[str]:
    """Fields that transformers says that it does not know."""
    told = str(said.get("detail")) if isinstance(said, dict) else ""
    return sorted(re.findall(r"'([^']*)'", told.partition("Unexpected fields in the request: ")[2]))


def _message(status: int, said: Any) -> str:
    if status >= 500:
        return "the engine failed on this request" if status == 500 else "the engine cannot take requests now"
    for key in ("detail", "message", "error"):
        if isinstance(said, dict) and key in said:
            said = said[key]
    return said if isinstance(said, str) and said else json.dumps(said)


def _code(status: int) -> str:
    return "engine_error" if status >= 500 else "invalid_request"


def _error(status: int, message: str, code: str | None, param: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {"message": message, "type": kind, "param": param, "code": code}
