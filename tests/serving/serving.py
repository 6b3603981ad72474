"""A live server around a tiny model, and a stand-in for an engine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from spectr import Calibrated, compose
from spectr.composition.multi_router import MultiRouter
from spectr.serving.catalog import AccessPolicy
from spectr.serving.engines import Step
from spectr.serving.engines.transformers import TransformersEngine
from spectr.serving.gateway import Gateway
from spectr.serving.server_settings import ServerSettings
from text_model import make_model, make_tokenizer

ALL, CATS, NONE, BASE, ADMIN = (
    "sk-all-of-them",
    "sk-cats-alone",
    "sk-nothing-at-all",
    "sk-base-alone",
    "sk-administrator",
)
POLICY = AccessPolicy.model_validate(
    {
        "keys": [
            {"name": "all", "key": ALL, "experts": "*", "base": True},
            {"name": "cats", "key": CATS, "experts": ["cats"]},
            {"name": "none", "key": NONE},
            {"name": "base", "key": BASE, "base": True},
            {"name": "admin", "key": ADMIN, "experts": "*", "admin": True},
        ]
    }
)


def settings(library, expert, **given):
    """A server's, of one expert, on a port that is free."""
    plain = {
        "routers": {},
        "model": None,
        "base_name": "tiny",
        "dtype": "float32",
        "served_name": "spectr",
        "policy_file": None,
        "host": "127.0.0.1",
        "port": 0,
        "count": True,
    }
    return ServerSettings(library=library, experts=(expert,), **{**plain, **given})


def several(library, routers, names=None):
    """A tiny model composed by these routers, with these experts alone."""
    model = make_model()
    model.config.max_position_embeddings = 64

    def maker(router):
        def make(model):
            routed = compose(model, library, router)
            return routed if names is None else routed.allow(names)

        return make

    return MultiRouter(model, {name: maker(router) for name, router in routers.items()})


def make_engine(library, router=None, names=None, **options):
    routers = router if isinstance(router, dict) else {"calibrated": router or Calibrated()}
    return TransformersEngine(several(library, routers, names), make_tokenizer(), base_model="tiny", **options)


@contextmanager
def live(app) -> Iterator[str]:
    """Serve on a free port; gives the address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@contextmanager
def served(library, router=None, policy=None, names=None, **options) -> Iterator[tuple[str, TransformersEngine]]:
    """A tiny model's server, with one router or with several by name, and its engine."""
    engine = make_engine(library, router, names, **options)
    try:
        with live(Gateway(engine.app, engine, policy=policy)) as address:
            yield address, engine
    finally:
        engine.close()


class StandIn:
    """An engine with given answers and any ASGI application."""

    name, base_model, routers, layers = "stand-in", "tiny", ("calibrated", "spectr"), ("one", "two")

    def __init__(self):
        self.experts, self.outlier_scores = ("ants", "bees", "cats"), {"bees": 9.31}
        self.fields = frozenset({"metadata", "padding", "top_k"})
        self.tickets, self.bodies, self.finished = [], [], []

    def admit(self, ticket, body):
        self.tickets.append(ticket)
        self.bodies.append(body)
        return {**body, "model": "inside"}

    def steps(self, ticket, answer):
        first = ticket.experts[:1]
        layer = dict.fromkeys(first, (1.0, 2.5))
        return {0: [Step(dict.fromkeys(first, 0.6666), (layer, {}) if ticket.record == "layers" else ())]}

    def finish(self, ticket):
        self.finished.append(ticket)

    async def discard(self, name):
        self.experts = tuple(other for other in self.experts if other != name)

    def metrics(self):
        return b"stand_in_up 1\n"
