"""Reports of what was chosen for each generated token, out of band: lines of JSON through a Unix socket.

They leave the worker before the token does, so that whoever gets the token finds its report in the socket.
"""

from __future__ import annotations

import json
import os
import select
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from spectr.vllm.worker_state import Session

SOCKET = "SPECTR_ROUTES_SOCKET"  # path of a Unix socket that somebody listens at; no graph depends on it
_ROOM = 64 << 20  # bytes that wait for a slow reader at most
_PATIENCE = 0.05  # seconds that a step waits for one


class Reporter:
    """Sends reports of one worker.

    Args:
        session: The worker's.
        stream: Connected to whoever listens.
    """

    def __init__(self, session: Session, stream: socket.socket):
        self.session, self.stream = session, stream
        self.modules = [module for layer in session.layers.values() for module in layer.held]
        self.lost = 0
        self._waiting = bytearray()
        self._put({"experts": list(session.experts), "layers": self.modules})

    @staticmethod
    def of(session: Session) -> Reporter | None:
        """A reporter, where the model records, this is the first rank, and somebody listens."""
        from vllm.distributed import get_tensor_model_parallel_rank

        path = os.environ.get(SOCKET)
        if not (session.settings.record and path and get_tensor_model_parallel_rank() == 0):
            return None
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        stream.connect(path)
        return Reporter(session, stream)

    def report(self, runner: Any) -> None:
        """Report the step that a runner has just computed, for the requests that ask. Before tokens are counted."""
        for number, (request, asked) in enumerate(zip(runner.input_batch.req_ids, runner.spectr_asked, strict=True)):
            if not asked.routing or runner.discard_request_mask.np[number]:
                continue
            told = {
                "id": asked.route_id,
                "request": request,
                "token": len(runner.requests[request].output_token_ids),
                **self.routing(number, asked.routing == "layers"),
            }
            self._put(told)

    def routing(self, number: int, by_layer: bool) -> dict[str, Any]:
        """What was chosen for the sampled token of one request of the batch, in the form of the API."""
        total_E = torch.zeros(len(self.session.experts), dtype=torch.float32)
        layers = []
        for layer in self.session.layers.values():
            for kept in layer.recorded(number):
                columns_E, scores_SE, weights_SE = (tensor.cpu() for tensor in kept)
                total_E.index_add_(0, columns_E, weights_SE.sum(0))
                if by_layer:
                    rows = zip(weights_SE.tolist(), scores_SE.tolist(), strict=True)
                    layers += [_chosen(columns_E.tolist(), *row) for row in rows]
        shares = sorted(enumerate((total_E / len(self.modules)).tolist()), key=lambda pair: -pair[1])
        told: dict[str, Any] = {"shares": [[e, round(share, 6)] for e, share in shares if share > 0]}
        return {**told, "by_layer": layers} if by_layer else told

    def _put(self, told: dict[str, Any]) -> None:
        line = json.dumps(told, separators=(",", ":")).encode() + b"\n"
        if len(self._waiting) + len(line) > _ROOM:
            self.lost += 1
            return
        self._waiting += line
        try:
            self._flush()
        except OSError:  # nobody listens any longer: routing goes on without reports
            self._waiting.clear()

    def _flush(self) -> None:
        while self._waiting:
            if not select.select([], [self.stream], [], _PATIENCE)[1]:
                return
            sent = self.stream.send(self._waiting, socket.MSG_DONTWAIT)
            del self._waiting[:sent]


class Listener:
    """The other end: make one before the engine, in the process that starts it.

    Attributes:
        experts: Names that the reports' numbers stand for; known when the engine has loaded its model.
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
        """Keep the reports of a request from now on; those of others are let go."""
        with self._changed:
            self._reports[route_id] = []

    def take(self, route_id: str, tokens: int = 0, patience: float = 0.5) -> list[dict[str, Any]]:
        """The reports of an expected request since the last call.

        Args:
            route_id: Of the request.
            tokens: Where fewer are there, it waits a moment.
            patience: How long, in seconds.
        """
        until = time.monotonic() + patience
        with self._changed:
            if route_id not in self._reports:
                return []
            while len(self._reports[route_id]) < tokens and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            taken, self._reports[route_id] = self._reports[route_id], []
            return taken

    def forget(self, route_id: str) -> None:
        """Let go of a request that is over."""
        with self._changed:
            self._reports.pop(route_id, None)

    def close(self) -> None:
        """Listen no longer."""
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
                told = json.loads(line)
                with self._changed:
                    if told.get("id") in self._reports:
                        self._reports[told["id"]].append(told)
                    elif "layers" in told:
                        self.experts, self.layers = tuple(told["experts"]), tuple(told["layers"])
                    self._changed.notify_all()


def _chosen(columns: list[int], weights: list[float], scores: list[float]) -> list[list[float]]:
    taken = [[c, round(w, 6), round(s, 6)] for c, w, s in zip(columns, weights, scores, strict=True) if w > 0]
    return sorted(taken, key=lambda triple: -triple[1])
