"""Errors in the form of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from spectr.errors import SpectrError

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
