"""A server that speaks the page's side of the API and says what a test tells it to."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import spectr

PAGE = Path(spectr.__file__).parent / "serving" / "playground"
EXPERTS = ("agnews", "cola", "mnli", "sst2")
BASE = "org/Small-Base"
MODULES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LAYERS = [f"model.layers.{block}.{module}" for block in range(4) for module in MODULES]


def routing_of(tokens, *, layers=True, experts=EXPERTS, names=LAYERS):
    """The contract's routing of tokens given as {expert: share}; every layer scores 1 + its own number / 10."""
    indexed = [[[experts.index(name), share] for name, share in token.items()] for token in tokens]
    found = {"experts": list(experts), "tokens": indexed}
    if layers:
        by_layer = [[[[e, w, 1 + n / 10] for e, w in token] for n in range(len(names))] for token in indexed]
        found |= {"layers": list(names), "by_layer": by_layer}
    return found


def chunk(text=None, *tokens, finish=None, **options):
    """One chunk of a chat completion: a text, and the tokens generated since the last chunk."""
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"choices": [choice | ({"routing": routing_of(tokens, **options)} if tokens else {})]}


def error(message, code, param=None, kind="invalid_request_error"):
    """A standard error body."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


PLAIN = [
    chunk("The", {"sst2": 0.9, "cola": 0.1}),
    chunk(" film", {"agnews": 0.6}),
    chunk(".", {"agnews": 0.5}, finish="stop"),
]


@dataclass
class StandIn:
    """What the server answers, and what it was asked.

    Attributes:
        routers: Of the first model.
        replies: By model: chunks, strings sent as they are, and events to wait for. The rest get PLAIN.
        refusals: By model, or field of a request: (status, body) instead.
        keys: API keys that are let in; None: anybody.
        outlier_scores: By model, how far an expert stands out.
        cut: End streams without the last word.
        raw: Bytes sent one by one before each reply, which then is empty.
    """

    routers: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["spectr", *(f"spectr/{name}" for name in EXPERTS), BASE])
    replies: dict[str, list] = field(default_factory=dict)
    refusals: dict[str, tuple[int, object]] = field(default_factory=dict)
    keys: set[str] | None = None
    cut: bool = False
    outlier_scores: dict[str, float | str] = field(default_factory=dict)
    raw: bytes = b""
    asked: list[dict] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    url: str = ""


class Handler(SimpleHTTPRequestHandler):
    """Static files under a strict policy, and the two endpoints."""

    def __init__(self, *args, stand_in, **options):
        self.stand_in = stand_in
        super().__init__(*args, directory=str(PAGE), **options)

    def log_message(self, *args):
        """Quiet."""

    def end_headers(self):
        self.send_header("Content-Security-Policy", "default-src 'self'")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def do_GET(self):
        if self.path == "/v1/models":
            self._models()
        elif self.path.startswith("/playground/"):
            self.path = self.path.removeprefix("/playground")
            super().do_GET()
        else:
            self._json(404, error("Not found", "not_found"))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stand_in.asked.append(request)
        refusals = self.stand_in.refusals
        refusal = self._unknown_key() or next(
            (refusals[key] for key in (request["model"], *request) if key in refusals), None
        )
        if refusal:
            self._json(*refusal)
        else:
            self._stream(self.stand_in.replies.get(request["model"], PLAIN))

    def _models(self):
        refusal = self._unknown_key()
        data = [{"id": name, "object": "model"} for name in self.stand_in.models]
        data[0]["routers"] = self.stand_in.routers
        for entry in data:
            if entry["id"] in self.stand_in.outlier_scores:
                entry["outlier_score"] = self.stand_in.outlier_scores[entry["id"]]
        self._json(*(refusal or (200, {"object": "list", "data": data})))

    def _unknown_key(self):
        given = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        allowed = self.stand_in.keys is None or given in self.stand_in.keys
        return None if allowed else (401, error("No such API key.", "invalid_api_key"))

    def _json(self, status, body):
        text = body if isinstance(body, str) else json.dumps(body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text.encode())

    def _stream(self, reply):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for byte in self.stand_in.raw:
                self._write(bytes([byte]))
            for part in [*([] if self.stand_in.raw else reply), *([] if self.stand_in.cut else ["[DONE]"])]:
                self._event(part)
        except (BrokenPipeError, ConnectionResetError):
            self.stand_in.hung_up.set()

    def _event(self, part):
        while isinstance(part, threading.Event) and not part.wait(0.02):
            self._write(": still here\n\n")
        if not isinstance(part, threading.Event):
            self._write(f"data: {part if isinstance(part, str) else json.dumps(part)}\n\n")

    def _write(self, text):
        self.wfile.write(text.encode() if isinstance(text, str) else text)
        self.wfile.flush()


@contextmanager
def served():
    """A running stand-in on a free port of this machine."""
    stand_in = StandIn()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, stand_in=stand_in))
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    stand_in.url = f"http://127.0.0.1:{http.server_port}/playground/"
    try:
        yield stand_in
    finally:
        http.shutdown()
        http.server_close()
