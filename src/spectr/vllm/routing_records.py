"""Reports of the routing of each generated token: lines of JSON through a Unix socket.

A report leaves the worker before its token does, so that it is in the socket when the token arrives.
"""

from __future__ import annotations

import json
import os
import select
import socket
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from spectr.composition.recorder import TokenRouting, token_routings
from spectr.vllm.requests import RequestOptions
from spectr.vllm.worker_state import WorkerState

SOCKET = "SPECTR_ROUTES_SOCKET"  # path of the listener's Unix socket; no graph depends on it
_MOST_WAITING = 64 << 20  # bytes, for a slow reader
_SEND_TIMEOUT = 0.05  # seconds that a step waits for a slow reader


class Reporter:
    """Sends reports of one worker.

    Args:
        state: The worker's state.
        stream: A socket that is connected to the listener.
    """

    def __init__(self, state: WorkerState, stream: socket.socket):
        self.state, self.stream = state, stream
        self.lost = 0
        self._waiting = bytearray()
        self._place = {name: place for place, name in enumerate(state.experts)}
        modules = [module for layer in state.layers.values() for module in layer.routed_modules]
        self._experts = [tuple(state.experts_of(module)) for module in modules]
        self._put({"experts": list(state.experts), "layers": modules})

    @staticmethod
    def of(state: WorkerState) -> Reporter | None:
        """A reporter, if the model records, this is the first rank, and a listener exists."""
        from vllm.distributed import get_tensor_model_parallel_rank

        path = os.environ.get(SOCKET)
        if not (state.settings.record and path and get_tensor_model_parallel_rank() == 0):
            return None
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        stream.connect(path)
        return Reporter(state, stream)

    def report(self, runner: Any) -> None:
        """Report the step that a runner has just computed, for requests that ask. Call it before tokens are counted."""
        rows = {
            number: options
            for number, options in enumerate(runner.spectr_options)
            if options.routing and not runner.discard_request_mask.np[number]
        }
        routings = self._routings(rows) if rows else []
        for (number, options), routing in zip(rows.items(), routings, strict=True):
            request = runner.input_batch.req_ids[number]
            self._put(
                {
                    "id": options.route_id,
                    "request": request,
                    "token": len(runner.requests[request].output_token_ids),
                    **self._in_numbers(routing, options.routing == "layers"),
                }
            )

    def _routings(self, rows: Mapping[int, RequestOptions]) -> list[TokenRouting]:
        """The routing of the sampled tokens of some requests in the batch."""
        in_full = any(options.routing == "layers" for options in rows.values())
        scores = self._kept("scores", list(rows)) if in_full else None
        return token_routings(self._experts, len(rows), self._kept("weights", list(rows)), scores)

    def _kept(self, name: str, requests: Sequence[int]) -> dict[int, Tensor]:
        layers = self.state.layers.values()
        return dict(enumerate(rows_NE for layer in layers for rows_NE in layer.recorded(name, requests)))

    def _in_numbers(self, routing: TokenRouting, by_layer: bool) -> dict[str, Any]:
        """A report's routing: experts by number, the largest weight first."""

        def ordered(chosen: Mapping[str, Sequence[float]]) -> list[list[float]]:
            rows = [[self._place[name], *(round(value, 6) for value in values)] for name, values in chosen.items()]
            return sorted(rows, key=lambda row: -row[1])

        report = {"shares": ordered({name: (share,) for name, share in routing.shares.items()})}
        return {**report, "by_layer": list(map(ordered, routing.layers))} if by_layer else report

    def _put(self, report: dict[str, Any]) -> None:
        line = json.dumps(report, separators=(",", ":")).encode() + b"\n"
        if len(self._waiting) + len(line) > _MOST_WAITING:
            self.lost += 1
            return
        self._waiting += line
        try:
            self._flush()
        except OSError:  # the listener is closed: routing goes on without reports
            self._waiting.clear()

    def _flush(self) -> None:
        while self._waiting:
            if not select.select([], [self.stream], [], _SEND_TIMEOUT)[1]:
                return
            sent = self.stream.send(self._waiting, socket.MSG_DONTWAIT)
            del self._waiting[:sent]


class Listener:
    """Receives the reports. Make one before the engine, in the process that starts it.

    Attributes:
        experts: The experts' names, in the order of the reports' numbers; known when the engine has loaded its model.
        layers: Names of the routed modules, in the order of the reports.
    """

    def __init__(self) -> None:
        self.experts: tuple[str, ...] = ()
        self.layers: tuple[str, ...] = ()
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._changed = threading.Condition()
        self._folder = tempfile.TemporaryDirectory(prefix="spectr-", ignore_cleanup_errors=True)
        self.path = str(Path(self._folder.name) / "routes")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self.path)
        self._socket.listen()
        os.environ[SOCKET] = self.path
        threading.Thread(target=self._accept, daemon=True, name="spectr-routes").start()

    def expect(self, route_id: str) -> None:
        """Keep the reports of a request from now on. Reports of other requests are dropped."""
        with self._changed:
            self._reports[route_id] = []

    def take(self, route_id: str, tokens: int = 0, timeout: float = 0.5) -> list[dict[str, Any]]:
        """The reports of an expected request since the last call.

        Args:
            route_id: The request's route id.
            tokens: The number of reports to wait for.
            timeout: Maximum number of seconds to wait.
        """
        until = time.monotonic() + timeout
        with self._changed:
            if route_id not in self._reports:
                return []
            while len(self._reports[route_id]) < tokens and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            taken, self._reports[route_id] = self._reports[route_id], []
            return taken

    def forget(self, route_id: str) -> None:
        """Drop the reports of a request that has ended."""
        with self._changed:
            self._reports.pop(route_id, None)

    def close(self) -> None:
        """Stop listening."""
        os.environ.pop(SOCKET, None)
        self._socket.close()
        self._folder.cleanup()

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: socket.socket) -> None:
        with stream, stream.makefile("rb") as lines:
            for line in lines:
                report = json.loads(line)
                with self._changed:
                    if report.get("id") in self._reports:
                        self._reports[report["id"]].append(report)
                    elif "layers" in report:
                        self.experts, self.layers = tuple(report["experts"]), tuple(report["layers"])
                    self._changed.notify_all()
