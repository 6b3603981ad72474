"""What middleware needs of ASGI messages, and changes to an engine's answer on its way to the client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from spectr.serving import api_fields
from spectr.serving.api_errors import RefusalError, error_body, standardised

_WITH = {401: {"www_authenticate": "Bearer"}, 503: {"retry_after": "10"}}  # headers of refusals


def bearer(scope: Scope) -> str | None:
    """The API key of a request."""
    kind, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else None


async def read_body(receive: Receive, scope: Scope, limit: int) -> bytes:
    """Read a request's body.

    Raises:
        RefusalError: 413: the body is longer than the limit; the rest is not read.
        ClientDisconnect: The client disconnected before it had sent the body.
    """
    request, body = Request(scope, receive), bytearray()
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(declared, limit)
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise _too_large("more", limit)
    return bytes(body)


def _too_large(size: str, limit: int) -> RefusalError:
    return RefusalError(
        f"the body has {size} bytes",
        expected=f"at most {limit} bytes",
        do="omit earlier turns, or split it into several requests",
        code="request_too_large",
        status=413,
    )


async def respond(send: Send, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
    """Send a complete answer."""
    lines = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    lines += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


class TrackedSend:
    """ASGI's ``send``, plus the state of the response.

    Args:
        send: ASGI's.
        bare: Send no body, as for ``HEAD``.

    Attributes:
        status: Status of the response; ``None`` before it starts.
    """

    def __init__(self, send: Send, *, bare: bool = False):
        self._send, self._bare = send, bare
        self._streams = self._ended = False
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        """Replaces ASGI's ``send``."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._streams = dict(message.get("headers", ())).get(b"content-type", b"").startswith(b"text/event-stream")
        await self._send({**message, "body": b""} if self._bare and "body" in message else message)
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def refuse(self, error: RefusalError) -> None:
        """Answer with an error, or end a stream with one."""
        if self.status is None:
            await respond(self, error.status, error.body, **_WITH.get(error.status, {}), **error.headers)
        elif self._streams and not self._ended:
            await self({"type": "http.response.body", "body": b"data: " + error.body + b"\n\ndata: [DONE]\n\n"})


def with_headers(message: Message, *, drop: tuple[bytes, ...] = (), **changed: str) -> Message:
    """The start of a response with other headers."""
    names = {name.replace("_", "-").encode() for name in changed} | set(drop)
    kept = [(key, value) for key, value in message.get("headers", ()) if key.lower() not in names]
    added = [(name.replace("_", "-").encode(), value.encode()) for name, value in changed.items()]
    return {**message, "headers": [*kept, *added]}


def rewritten(scope: Scope, body: bytes, request_id: str) -> Scope:
    """The scope for the application: with another body, which is JSON whatever type the client declared, our id, and no
    credentials."""
    length = str(len(body)).encode()
    ours = {b"content-type": b"application/json", b"content-length": length, b"x-request-id": request_id.encode()}
    theirs = {b"authorization", b"content-encoding", b"transfer-encoding", *ours}
    kept = [(key, value) for key, value in scope["headers"] if key.lower() not in theirs]
    return {**scope, "headers": [*kept, *ours.items()]}


class Connection:
    """The connection to a client: gives the application a body, and notices a disconnect."""

    def __init__(self, receive: Receive, body: bytes):
        self._body: bytes | None = body
        self._gone = asyncio.Event()
        self._watch = asyncio.ensure_future(self._listen(receive))

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone.set()

    async def receive(self) -> Message:
        """What the application receives: the body once, then the end."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def hold_for(self, work: Awaitable[None], answered: Callable[[], bool]) -> None:
        """Wait for the work. A client that disconnects earlier cancels the work.

        Raises:
            ClientDisconnect: The client disconnected first.
        """
        task, left = asyncio.ensure_future(work), asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and not answered():
                raise ClientDisconnect
            await task
        finally:
            for pending in (task, left, self._watch):
                pending.cancel()
            await asyncio.gather(task, left, self._watch, return_exceptions=True)


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


class Usage:
    """Puts an answer's ``usage`` where OpenAI's API has it, wherever the engine puts it.

    A complete answer has it. A stream has it if ``stream_options`` request it (``include_usage``), in a separate chunk
    without choices; the chunks before have ``null``.

    Args:
        request: The request.

    Attributes:
        last: The engine's last value; empty before the first.
    """

    def __init__(self, request: api_fields.Request):
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
