"""The number of tokens of an answer, and where a client finds it."""

from __future__ import annotations

from typing import Any

from spectr.serving.api_fields import Request


class Usage:
    """Puts an answer's ``usage`` where OpenAI's API has it, wherever the engine puts it.

    A complete answer has it. A stream has it if ``stream_options`` request it (``include_usage``), in a separate chunk
    without choices; the chunks before have ``null``.

    Args:
        request: The request.

    Attributes:
        last: The engine's last value; empty before the first.
    """

    def __init__(self, request: Request):
        self._streams = bool(request.stream)
        self._wanted = request.stream_options is not None and bool(request.stream_options.include_usage)
        self.last: dict[str, Any] = {}

    def placed(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """The replacement of a complete answer, or of a stream's chunk."""
        found = answer.get("usage")
        self.last = found or self.last
        if not self._streams:
            return [answer]
        chunk = {key: value for key, value in answer.items() if key != "usage"}
        chunks = [chunk | ({"usage": None} if self._wanted else {})] if chunk.get("choices") else []
        return chunks + ([chunk | {"choices": [], "usage": found}] if found and self._wanted else [])
