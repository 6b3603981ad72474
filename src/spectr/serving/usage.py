"""The tokens that an answer takes, and where its reader finds them."""

from __future__ import annotations

from typing import Any

from spectr.serving.api_fields import Request


class Usage:
    """Puts the ``usage`` of an answer where OpenAI's API has it, wherever the engine does.

    A whole answer has it. A stream has it where ``stream_options`` have (``include_usage``): in a chunk of its
    own, without choices; the chunks before have ``null``.

    Args:
        request: The request.

    Attributes:
        last: The last one that the engine gave; empty before it.
    """

    def __init__(self, request: Request):
        self._streams = bool(request.stream)
        self._wanted = request.stream_options is not None and bool(request.stream_options.include_usage)
        self.last: dict[str, Any] = {}

    def placed(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """What stands in the place of a whole answer, or of a stream's chunk."""
        found = answer.get("usage")
        self.last = found or self.last
        if not self._streams:
            return [answer]
        chunk = {key: value for key, value in answer.items() if key != "usage"}
        chunks = [chunk | ({"usage": None} if self._wanted else {})] if chunk.get("choices") else []
        return chunks + ([chunk | {"choices": [], "usage": found}] if found and self._wanted else [])
