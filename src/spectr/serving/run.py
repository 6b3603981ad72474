"""An engine's application behind the gateway, on a socket, until somebody ends it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from spectr.errors import CompositionError
from spectr.serving.engines.base import Engine
from spectr.serving.gateway import Gateway
from spectr.serving.settings import Settings

if TYPE_CHECKING:
    import uvicorn

_PATIENCE = 10  # seconds that answers have to end when the server is to


async def listen(
    app: Any,
    engine: Engine,
    settings: Settings,
    bound: socket.socket,
    say: Callable[[str], None],
    watch: Callable[[uvicorn.Server], Awaitable[None]] | None = None,
) -> None:
    """Serve until the process is interrupted; say what is served once it can be reached.

    Args:
        app: The engine's own application.
        engine: Of that application.
        settings: What was asked for.
        bound: From :meth:`Settings.listen`.
        say: Shows one line.
        watch: Is given the server, and may end it.

    Raises:
        CompositionError: No layer is routed.
    """
    from uvicorn import Config, Server

    if not engine.layers:
        raise CompositionError("no layer of this model is routed", do="check the library with spectr library list")
    gateway = Gateway(app, engine, policy=settings.policy(), served=settings.served, count=settings.count)
    lines = told(settings, engine, bound.getsockname()[1], page=gateway.page is not None)
    config = Config(gateway, log_level="warning", server_header=False, timeout_graceful_shutdown=_PATIENCE)
    server = Server(config)
    beside = [
        asyncio.ensure_future(_tell(server, lines, say)),
        *([asyncio.ensure_future(watch(server))] if watch else []),
    ]
    try:
        await server.serve(sockets=[bound])
    finally:
        for task in beside:
            task.cancel()


async def _tell(server: uvicorn.Server, lines: list[str], say: Callable[[str], None]) -> None:
    """Say what is served once it can be reached, and that it ends when it is to."""
    while not server.started:
        await asyncio.sleep(0.02)
    for line in lines:
        say(line)
    while not server.should_exit:
        await asyncio.sleep(0.1)
    say(f"ending; answers under way have {_PATIENCE} seconds, and Ctrl-C again ends at once")


def told(settings: Settings, engine: Engine, port: int, *, page: bool) -> list[str]:
    """What is served, to whom, where; and which experts somebody should look at."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    lines = [
        f"warning: the updates of '{name}' are far larger than the other experts' (robust z-score {score:.1f}); if you "
        f"did not expect that: --except {name}"
        for name, score in engine.suspicion.items()
    ]
    default, *others = engine.routers
    by = default + (f" (by request: {', '.join(others)})" if others else "")
    lines.append(f"{len(engine.layers)} layers routed among {', '.join(engine.experts)}, by {by}")
    lines.append(
        f"keys: {'none needed, as there is no policy' if settings.policy_file is None else settings.policy_file}"
    )
    lines += [f"page: http://{host}:{port}/playground/"] if page else []
    lines.append(f"serving '{settings.served}' and '{settings.base_name}' at http://{host}:{port}/v1, Ctrl-C ends it")
    return lines
