"""What an answer takes of tokens, and where its reader is told."""

from __future__ import annotations

from typing import Any

from spectr.serving.api_fields import Request


class Usage:
    """Puts the ``usage`` of an answer where OpenAI's API has it, wherever the engine does.

    A whole answer has it. A stream has it where ``stream_options`` ask for it (``include_usage``): in a chunk of its
    own, without choices; the chunks before have ``null``.

    Args:
        request: What was asked for.

    Attributes:
        told: The engine's last word; empty before it.
    """

    def __init__(self, request: Request):
        self._streams = bool(request.stream)
        self._asked = request.stream_options is not None and bool(request.stream_options.include_usage)
        self.told: dict[str, Any] = {}

    def placed(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """What stands in the place of a whole answer, or of a stream's chunk."""
        found = answer.get("usage")
        self.told = found or self.told
        if not self._streams:
            return [answer]
        chunk = {key: value for key, value in answer.items() if key != "usage"}
        chunks = [chunk | ({"usage": None} if self._asked else {})] if chunk.get("choices") else []
        return chunks + ([chunk | {"choices": [], "usage": found}] if found and self._asked else [])
