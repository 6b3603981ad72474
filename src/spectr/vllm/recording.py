"""Reports of what was chosen for each generated token, out of band: lines of JSON through a socket."""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
from typing import Any

import torch

from spectr.vllm.session import Session

SOCKET = "SPECTR_ROUTES_SOCKET"  # path of a Unix socket that somebody listens at; no graph depends on it
_WAITING = 4096  # lines that wait to be sent at most; the engine never waits for a reader


class Reporter:
    """Sends reports of one worker.

    Args:
        session: The worker's.
        path: Of the socket.
    """

    def __init__(self, session: Session, path: str):
        self.session = session
        self.modules = [(name, module) for name, layer in session.layers.items() for module in layer.held]
        self.lost = 0
        self._lines: queue.Queue[bytes] = queue.Queue(_WAITING)
        self._path = path
        threading.Thread(target=self._send, daemon=True, name="spectr-routes").start()
        self._put({"experts": list(session.experts), "layers": [module for _, module in self.modules]})

    @staticmethod
    def of(session: Session) -> Reporter | None:
        """A reporter, where the model records, this is the first rank, and somebody listens."""
        from vllm.distributed import get_tensor_model_parallel_rank

        path = os.environ.get(SOCKET)
        if not (session.settings.record and path and get_tensor_model_parallel_rank() == 0):
            return None
        return Reporter(session, path)

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
        total_E = torch.zeros(len(self.session.experts))
        layers = []
        for layer in self.session.layers.values():
            for kept in layer.recorded(number):
                columns_E, scores_SE, weights_SE = (tensor.cpu() for tensor in kept)
                total_E.index_add_(0, columns_E, weights_SE.sum(0))
                if by_layer:
                    rows = zip(weights_SE.tolist(), scores_SE.tolist(), strict=True)
                    layers += [_chosen(columns_E.tolist(), *row) for row in rows]
        shares = sorted(enumerate((total_E / len(self.modules)).tolist()), key=lambda pair: -pair[1])
        told: dict[str, Any] = {"shares": [[e, round(share, 3)] for e, share in shares if round(share, 3) > 0]}
        return {**told, "by_layer": layers} if by_layer else told

    def _put(self, told: dict[str, Any]) -> None:
        try:
            self._lines.put_nowait(json.dumps(told, separators=(",", ":")).encode() + b"\n")
        except queue.Full:
            self.lost += 1

    def _send(self) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
                stream.connect(self._path)
                while True:
                    stream.sendall(self._lines.get())
        except OSError:  # nobody listens, or no longer: routing goes on without reports
            while True:
                self._lines.get()


def _chosen(columns: list[int], weights: list[float], scores: list[float]) -> list[list[float]]:
    taken = [[c, round(w, 3), round(s, 4)] for c, w, s in zip(columns, weights, scores, strict=True) if w > 0]
    return sorted(taken, key=lambda triple: -triple[1])
