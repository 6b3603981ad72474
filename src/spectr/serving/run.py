"""An engine's application behind the gateway, on a socket, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from spectr.serving.engines.engine import Engine
from spectr.serving.gateway import Gateway, Shutdown
from spectr.serving.server_settings import ServerSettings

if TYPE_CHECKING:
    import uvicorn

_LAST_STEPS = 2  # seconds for an engine's processes to end by themselves
_LAST_BYTES = 1  # seconds for closing connections; clients that do not read are dropped


async def listen(
    app: Any,
    engine: Engine,
    settings: ServerSettings,
    bound: socket.socket,
    say: Callable[[str], None],
    watch: Callable[[uvicorn.Server], Awaitable[None]] | None = None,
) -> None:
    """Serve until the process is interrupted; print what is served when it is reachable.

    The first SIGINT or SIGTERM gives running answers ``settings.grace`` seconds. The second ends at once. The third
    kills the process, even during the cleanup after this function.

    Args:
        app: The engine's own application.
        engine: Of that application.
        settings: What to serve.
        bound: From :meth:`ServerSettings.listen`.
        say: Prints one line.
        watch: Receives the server, and may end it.

    Raises:
        CompositionError: No layer is routed.
        KeyboardInterrupt: SIGINT ended it.
    """
    from uvicorn import Config, Server

    gateway = Gateway(
        app, engine, policy=settings.policy(), served_name=settings.served_name, count=settings.count, say=say
    )
    lines = summary(settings, engine, bound.getsockname()[1], page=gateway.page is not None)
    config = Config(gateway, log_level="warning", server_header=False, timeout_graceful_shutdown=2 * _LAST_BYTES)
    server = Server(config)
    signals: list[int] = []
    server.handle_exit = lambda sig, frame: _note(signals, sig)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)  # stays after the server restores its own handlers
    tasks = [
        asyncio.ensure_future(_announce(server, lines, say)),
        asyncio.ensure_future(_end(server, gateway.shutdown, settings.grace, signals, say)),
        *([asyncio.ensure_future(watch(server))] if watch else []),
    ]
    try:
        await server.serve(sockets=[bound])
    finally:
        for task in tasks:
            task.cancel()
    if signal.SIGINT in signals:
        raise KeyboardInterrupt


def _note(signals: list[int], number: int) -> None:
    """The effect of a signal: it is recorded. The third signal kills the process, which apparently does not react.

    An engine's processes ignore Ctrl-C. They end before this process; those that do not react are killed too.
    """
    signals.append(number)
    if len(signals) > 2:
        signal.signal(number, signal.SIG_DFL)  # one more signal does not wait for them
        _end_children()
        signal.raise_signal(number)


def _end_children() -> None:
    children, until = multiprocessing.active_children(), time.monotonic() + _LAST_STEPS
    for child in children:
        child.terminate()
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
    for child in children:
        child.kill()


async def _announce(server: uvicorn.Server, lines: list[str], say: Callable[[str], None]) -> None:
    """Print what is served when it is reachable."""
    while not server.started:
        await asyncio.sleep(0.02)
    for line in lines:
        say(line)


async def _end(
    server: uvicorn.Server, shutdown: Shutdown, grace: float, signals: list[int], say: Callable[[str], None]
) -> None:
    """When the server is to end, let running answers end first, but at most for the grace period."""
    while not (signals or server.should_exit):
        await asyncio.sleep(0.1)
    shutdown.begin()
    until = time.monotonic() + grace
    if shutdown.under_way and grace:
        say(f"stopping: waiting up to {grace:g} seconds for {_requests(shutdown)}; press Ctrl-C again to stop at once")
    while shutdown.under_way and len(signals) < 2 and time.monotonic() < until:
        await asyncio.sleep(0.05)
    say(f"stopping: {_requests(shutdown)} cut off" if shutdown.under_way else "stopping: no request is running")
    log = logging.getLogger("uvicorn.error")
    log.disabled = True  # it would list each request that was cut off
    await shutdown.end()
    log.disabled = False
    server.should_exit = True
    await asyncio.sleep(_LAST_BYTES)
    server.force_exit = True


def _requests(shutdown: Shutdown) -> str:
    return f"{shutdown.under_way} request{'' if shutdown.under_way == 1 else 's'}"


def summary(settings: ServerSettings, engine: Engine, port: int, *, page: bool) -> list[str]:
    """What is served, to whom and where, and experts that stand out."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    lines = [
        f"warning: the updates of '{name}' are far larger than those of the other experts (robust z-score "
        f"{score:.1f}); if you did not expect that, use --except {name}"
        for name, score in engine.outlier_scores.items()
    ]
    default, *others = engine.routers
    by = default + (f" (by request: {', '.join(others)})" if others else "")
    lines.append(f"{len(engine.layers)} layers routed among {', '.join(engine.experts)}, by {by}")
    open_to_all = "none (no policy): everyone on this machine may use and remove every expert"
    lines.append(f"keys: {settings.policy_file or open_to_all}")
    lines += [f"page: http://{host}:{port}/playground/"] if page else []
    lines.append(
        f"serving '{settings.served_name}' and '{settings.base_name}' at http://{host}:{port}/v1; press Ctrl-C to stop"
    )
    return lines
