"""Errors as OpenAI's API tells them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import re
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
    ):
        super().__init__(given, expected=expected, do=do)
        self.code, self.param, self.status = code, param, status

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
    return error_body(status, _message(status, said), _code(status))


def _message(status: int, said: Any) -> str:
    if status >= 500:
        return "the engine failed on this request" if status == 500 else "the engine cannot take requests now"
    for key in ("detail", "message", "error"):
        if isinstance(said, dict) and key in said:
            said = said[key]
    if not isinstance(said, str) or not said:
        return json.dumps(said)
    unknown = said.partition("Unexpected fields in the request: ")[2]  # as transformers tells of them
    names = ", ".join(sorted(re.findall(r"'[^']*'", unknown)))
    return f"{names}: no field that this engine knows\n  to do: leave it out" if names else said


def _code(status: int) -> str:
    return "engine_error" if status >= 500 else "invalid_request"


def _error(status: int, message: str, code: str | None, param: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {"message": message, "type": kind, "param": param, "code": code}
