"""Change an engine's answer on its way to the client: add the routing, and standardise errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import Message, Send

from spectr.serving.asgi import with_headers
from spectr.serving.errors import error_body, standardised

Edit = Callable[[dict[str, Any]], Sequence[dict[str, Any]]]  # returns the replacements


class Answer:
    """Passes on a response and edits each JSON object in it: the whole body, or every event of a stream.

    Attributes:
        status: Status of the response; ``None`` before it starts.
        done: Whether the last byte was sent.
    """

    def __init__(self, send: Send, edit: Edit):
        self._send, self._edit = send, edit
        self._start: Message = {}
        self._buffer = b""
        self._streams = self._closed = False
        self.status: int | None = None
        self.done = False

    async def __call__(self, message: Message) -> None:
        """Replaces ASGI's ``send``."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body" and not self.done:
            self._buffer += message.get("body", b"")
            last = not message.get("more_body", False)
            await (self._pass_events(last) if self._streams else self._pass_whole(last))

    async def _begin(self, message: Message) -> None:
        self._start, self.status = message, message["status"]
        kind = dict(message.get("headers", ())).get(b"content-type", b"")
        self._streams = message["status"] < 400 and kind.startswith(b"text/event-stream")
        if self._streams:
            await self._send(with_headers(message, drop=(b"content-length",), cache_control="no-cache"))

    async def _pass_whole(self, last: bool) -> None:
        if not last:
            return
        assert self.status is not None
        body = self._buffer if self.status < 400 else standardised(self.status, self._buffer)
        status = 400 if self.status == 422 else self.status
        if status < 400:
            body = b"".join(self._edited(body))
        self.status, self.done = status, True
        start = with_headers(self._start, content_length=str(len(body)), content_type="application/json")
        await self._send({**start, "status": status})
        await self._send({"type": "http.response.body", "body": body})

    async def _pass_events(self, last: bool) -> None:
        *events, self._buffer = self._buffer.replace(b"\r\n", b"\n").split(b"\n\n")
        events += [self._buffer] if last and self._buffer.strip() else []
        out = b"".join(self._event(event) for event in events)
        if last and not self._closed:
            out += b"data: [DONE]\n\n"
        self.done = last
        if out or last:
            await self._send({"type": "http.response.body", "body": out, "more_body": not last})

    def _event(self, event: bytes) -> bytes:
        if self._closed or not event.startswith(b"data:"):
            return b"" if self._closed else event + b"\n\n"
        data = event.removeprefix(b"data:").strip()
        self._closed = data == b"[DONE]"
        edited = [data] if self._closed else self._edited(data)
        return b"".join(b"data: " + one + b"\n\n" for one in edited)

    def _edited(self, data: bytes) -> list[bytes]:
        try:
            answer = json.loads(data)
        except ValueError:
            answer = {"error": None}
        if not isinstance(answer, dict) or "error" in answer:
            return [error_body(500, "the engine failed during the answer", "engine_error")]
        return [json.dumps(one, ensure_ascii=False, separators=(",", ":")).encode() for one in self._edit(answer)]
