"""The gateway between clients and an engine's own application, for any engine: its page, its requests, its end."""

from __future__ import annotations

import asyncio
import json
import logging
import mimetypes
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from spectr.errors import CompositionError, SpectrError
from spectr.serving.api_errors import RefusalError
from spectr.serving.api_fields import ChatRequest, CompletionRequest, Request, parse, routing
from spectr.serving.asgi import (
    Answer,
    Connection,
    Edit,
    TrackedSend,
    Usage,
    bearer,
    read_body,
    respond,
    rewritten,
)
from spectr.serving.catalog import AccessPolicy, Catalog
from spectr.serving.engines.engine import Engine, Ticket
from spectr.serving.metrics import CONTENT_TYPE, Metrics

FINAL_SECONDS = 2.0  # seconds for the last answers


class Shutdown:
    """Whether a server is stopping, and its running requests.

    Attributes:
        begun: New requests are refused.
        over: Running requests are cut off.
    """

    def __init__(self) -> None:
        self.begun = self.over = False
        self._under_way: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> int:
        """Requests without an answer yet."""
        return len(self._under_way)

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Inside the block, the current task is a running request; it is cancelled when the time is over."""
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        try:
            yield
        finally:
            self._under_way.discard(task)

    def check(self) -> None:
        """Raise :class:`RefusalError` for a request that arrives too late."""
        if self.begun:
            raise stopped("the server is stopping and takes no new requests")

    def begin(self) -> None:
        """Refuse new requests from now on."""
        self.begun = True

    async def end(self) -> None:
        """Cut off running requests; returns after they ended."""
        self.begin()
        self.over = True
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=FINAL_SECONDS)


def stopped(given: str = "the server stopped before this answer was complete") -> RefusalError:
    """The answer to a request that the stopping server does not complete."""
    return RefusalError(given, do="try again later", code="server_stopping", status=503)


def find_page() -> Path | None:
    """The folder of the page's files."""
    folder = Path(__file__).parent / "playground"
    return folder if (folder / "index.html").is_file() else None


def page_file(folder: Path | None, name: str) -> tuple[bytes, str]:
    """One of the page's files, with its content type.

    Raises:
        RefusalError: 404: there is no file of this name.
    """
    path = (folder / (name or "index.html")).resolve() if folder else None
    if path is None or folder is None or not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise RefusalError(f"there is no page '{name}'", code="not_found", status=404)
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return path.read_bytes(), f"{kind}; charset=utf-8" if kind.startswith("text/") else kind


log = logging.getLogger("spectr.serving")
_GENERATE: Mapping[str, type[Request]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
_MAX_BODY = 4 << 20
_WHERE = "/v1/models lists the models; /v1/chat/completions and /v1/completions answer"


def _endpoint(path: str) -> str:
    """The name under which a path is counted."""
    if path in ("/", "/health", "/metrics", *_GENERATE):
        return path
    heads = (
        head for head in ("/v1/models", "/v1/experts", "/playground") if path == head or path.startswith(head + "/")
    )
    return next(heads, "other")


def _near(path: str) -> str:
    """The path that the client may have meant; a base URL often lacks its last part, or repeats it."""
    near = [place for place in ("/v1/models", *_GENERATE) if path.endswith(place.removeprefix("/v1"))]
    return f"use {near[0]}; a client's base URL ends in /v1" if near else _WHERE


class Gateway:
    """An ASGI application around an engine's application: checks keys and requests, and completes answers.

    Args:
        app: The engine's own application.
        engine: See :class:`Engine`.
        policy: API keys; without a policy everything is open.
        served_name: The composed model's name.
        count: Whether the engine records every request's shares, for the tokens by expert in ``/metrics``.
        max_body: Maximum size of a request in bytes.
        say: Prints one line when an expert was removed.

    Attributes:
        shutdown: Ends the server.

    Raises:
        CompositionError: No layer is routed.
        SpectrError: The composed model has the base model's name.
    """

    def __init__(
        self,
        app: ASGIApp,
        engine: Engine,
        *,
        policy: AccessPolicy | None = None,
        served_name: str = "spectr",
        count: bool = True,
        max_body: int = _MAX_BODY,
        say: Callable[[str], None] = log.info,
    ):
        if not engine.layers:
            raise CompositionError("no layer of this model is routed", do="check the library with spectr library list")
        self.say = say
        self.app, self.engine, self.max_body, self.count = app, engine, max_body, count
        self.catalog = Catalog(engine, policy, served_name)
        self.metrics, self.shutdown = Metrics(), Shutdown()
        self.metrics.describe(engine)
        self.page = find_page()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.monotonic(), 500
        tracked = TrackedSend(send, bare=scope["method"] == "HEAD")
        try:
            with self.shutdown.tracked():
                await self._answer(scope, receive, tracked)
            status = tracked.status or 500
        except ClientDisconnect:
            status = 499  # the code in nginx's logs; no client reads it
            self.metrics.hangups.inc()
        finally:
            self._count(scope["path"], status, began)

    async def _answer(self, scope: Scope, receive: Receive, send: TrackedSend) -> None:
        try:
            self.shutdown.check()
            await self._route(scope, receive, send)
        except RefusalError as error:
            await send.refuse(error)
        except asyncio.CancelledError:
            if not self.shutdown.over:
                raise
            with suppress(asyncio.TimeoutError):  # a client that does not read
                await asyncio.wait_for(send.refuse(stopped()), FINAL_SECONDS / 2)
        except ClientDisconnect:
            raise
        except Exception:
            log.exception("the engine failed on %s", scope["path"])
            await send.refuse(RefusalError("the engine failed on this request", code="engine_error", status=500))

    def _count(self, path: str, status: int, began: float) -> None:
        self.metrics.requests.labels(_endpoint(path), str(status)).inc()
        if path in _GENERATE:
            self.metrics.seconds.observe(time.monotonic() - began)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method, place = scope["path"], scope["method"], _endpoint(scope["path"])
        name = path.removeprefix(place).lstrip("/")
        if method == "HEAD":  # like GET, without sending the body
            scope = {**scope, "method": "GET"}
        routes: dict[tuple[str, str], Callable[[], Awaitable[None]]] = {
            ("GET", "/"): lambda: self._point(send),
            ("GET", "/health"): lambda: self.app(scope, receive, send),
            ("GET", "/metrics"): lambda: self._metrics(scope, send),
            ("GET", "/v1/models"): lambda: self._models(scope, send, name),
            ("GET", "/playground"): lambda: self._play(scope, send),
            ("GET", "/v1/experts"): lambda: self._experts(scope, send, name),
            ("DELETE", "/v1/experts"): lambda: self._discard(scope, send, name),
            **{("POST", place): lambda: self._generate(scope, receive, send) for place in _GENERATE},
        }
        found = routes.get((scope["method"], place))
        if found is not None:
            await found()
        elif place == "other":
            raise RefusalError(f"{path} does not exist", do=_near(path), code="not_found", status=404)
        else:
            takes = [method for method, where in routes if where == place]
            takes += ["HEAD"] if "GET" in takes else []
            raise RefusalError(
                f"{path} does not support {method}",
                expected=" or ".join(takes),
                code="method_not_allowed",
                status=405,
                headers={"allow": ", ".join(takes)},
            )

    async def _point(self, send: Send) -> None:
        """Where the models and the page are; a browser is redirected to the page if there is one."""
        places = {"models": "/v1/models", "health": "/health"} | ({"page": "/playground/"} if self.page else {})
        location = {"location": "playground/"} if self.page else {}
        await respond(send, 307 if self.page else 200, json.dumps(places).encode(), **location)

    async def _metrics(self, scope: Scope, send: Send) -> None:
        self.catalog.administrator(bearer(scope))
        await respond(send, 200, self.metrics.text() + self.engine.metrics(), CONTENT_TYPE)

    async def _models(self, scope: Scope, send: Send, name: str) -> None:
        grant = self.catalog.grant(bearer(scope))
        found = self.catalog.entry(grant, name) if name else self.catalog.listing(grant)
        await respond(send, 200, json.dumps(found).encode())

    async def _experts(self, scope: Scope, send: Send, name: str) -> None:
        self.catalog.administrator(bearer(scope))
        await respond(send, 200, json.dumps(self.catalog.loaded(name or None)).encode())

    async def _discard(self, scope: Scope, send: Send, name: str) -> None:
        holder = self.catalog.administrator(bearer(scope))
        if not name:
            raise RefusalError(
                "the request names no expert",
                expected="DELETE /v1/experts/NAME",
                do="name one of the experts that GET /v1/experts lists",
                code="invalid_request",
            )
        self.catalog.loaded(name)
        try:
            await self.engine.discard(name)
        except RefusalError:
            raise
        except SpectrError as error:
            raise RefusalError(str(error), code="expert_not_removable", status=409) from error
        self.metrics.forget(name)
        self.say(f"expert '{name}' was removed" + (f" with the key '{holder}'" if holder else ""))
        await respond(send, 200, json.dumps({"id": name, "object": "expert", "deleted": True}).encode())

    async def _play(self, scope: Scope, send: Send) -> None:
        rest = scope["path"].removeprefix("/playground")
        if rest == "":  # so that the page's relative links resolve
            await respond(send, 307, b"", location="playground/")
            return
        body, kind = page_file(self.page, rest.strip("/"))
        await respond(send, 200, body, kind, cache_control="no-cache")

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        grant = self.catalog.grant(bearer(scope))
        body = await read_body(receive, scope, self.max_body)
        request, raw = parse(_GENERATE[scope["path"]], body, self.engine.fields)
        ticket = self.catalog.ticket(grant, request, count=self.count)
        admitted = json.dumps(self.engine.admit(ticket, raw)).encode()
        usage = Usage(request)
        with self._running(ticket, usage):
            connection = Connection(receive, admitted)
            answer = Answer(send, self._editor(ticket, request, usage))
            work = self.app(rewritten(scope, admitted, ticket.id), connection.receive, answer)
            await connection.hold_for(work, lambda: answer.done)

    @contextmanager
    def _running(self, ticket: Ticket, usage: Usage) -> Iterator[None]:
        with self.metrics.running.track_inprogress():
            try:
                yield
            finally:
                self.engine.finish(ticket)
                self.metrics.count_usage(usage.last)

    def _editor(self, ticket: Ticket, request: Request, usage: Usage) -> Edit:
        """The change to each JSON object of an answer."""

        def edit(answer: dict[str, Any]) -> list[dict[str, Any]]:
            steps = self.engine.steps(ticket, answer) if ticket.record != "none" else {}
            for choice in answer.get("choices") or ():
                done = steps.get(choice.get("index", 0), ())
                self.metrics.count_steps(ticket.experts, done)
                if request.return_routing:
                    choice["routing"] = routing(ticket, done, self.engine.layers)
            if "model" in answer:
                answer["model"] = request.model
            return usage.placed(answer)

        return edit
