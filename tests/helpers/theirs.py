"""Another package: a router, evidence, a combination, a merge, an experiment and an engine, each as short as can be.

CONTRIBUTING says what each is. Nothing here is known to spectr but by the entry points of ``test_other_package.py``.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar

import torch
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from spectr.combine import Combination, merge_outputs
from spectr.evaluation.experiments import Result
from spectr.layers import trace
from spectr.merging.linear import Average
from spectr.models import generate_answers
from spectr.routers import Evidence, Found, Router
from spectr.selection import TopK
from spectr.serving.engines import Step
from spectr.serving.run import listen
from spectr.spectral import Share, segment_norms


@dataclass(frozen=True, kw_only=True)
class Modest(Router):
    """The experts that change a token least."""

    top_k: int = 4
    combine: str = "outputs"

    @property
    def selection(self):
        return TopK(k=self.top_k)

    def init_expert(self, expert, side):
        return Share.spectral(expert.aligned)

    def scores(self, state, x_TI, h_TP, allowed_TE):
        return -segment_norms(h_TP, state)


@dataclass(frozen=True, kw_only=True)
class Short(Evidence):
    """The shorter a prompt, the more for the experts that come first in the alphabet."""

    length: int = 100

    def reader(self, source, experts):
        places_E = torch.tensor([float(source.library.names.index(name)) for name in experts])

        def read(input_ids, **_):
            likes_E = places_E if input_ids.shape[1] > self.length else -places_E
            return Found(likes_E.expand(len(input_ids), -1))

        return read


def louder(gain: float = 1.0) -> Combination:
    """The mean of the chosen outputs, times a number."""
    return Combination(lambda h_TP, weights_TE, *factors: gain * merge_outputs(h_TP, weights_TE, *factors))


class Soup(Average):
    """The average, under another name."""

    name: ClassVar[str] = "soup"


def count(bench) -> Result:
    """How many experts there are."""
    rows = [["experts", len(bench.library)]]
    return Result(name="count", title="Experts", source="theirs", columns=["what", "number"], rows=rows)


class Plain:
    """An engine that answers one request after the other. See ``spectr.serving.engines.Engine``."""

    name, fields, outlier_scores = "plain", frozenset({"max_tokens"}), {}

    def __init__(self, routed, model, tokenizer, settings):
        self.routed, self.model, self.tokenizer = routed, model, tokenizer
        self.base_model, self.routers = settings.base_name, tuple(settings.routers)
        self.experts, self.layers = routed.experts, tuple(routed.layers)
        self.tickets, self.found = {}, {}
        answer = Route("/v1/completions", self.answer, methods=["POST"])
        self.app = Starlette(routes=[answer, Route("/health", lambda _: JSONResponse({}))])

    def admit(self, ticket, body):
        self.tickets[ticket.id] = ticket
        return dict(body)

    async def answer(self, request):
        ticket, body = self.tickets[request.headers["x-request-id"]], await request.json()
        self.routed.allow(ticket.experts)
        with trace(self.model) as record:
            [text] = generate_answers(self.model, self.tokenizer, [body["prompt"]], max_new_tokens=1)
        self.found[ticket.id] = [Step(record.shares())]
        return JSONResponse({"object": "text_completion", "model": "", "choices": [{"index": 0, "text": text}]})

    def steps(self, ticket, answer):
        return {0: self.found.pop(ticket.id, [])}

    def finish(self, ticket):
        del self.tickets[ticket.id]

    async def discard(self, name):
        self.experts = tuple(expert for expert in self.experts if expert != name)

    def metrics(self):
        return b""


class Launcher:
    """Starts it. See ``spectr.serving.engines.launchers.Launcher``."""

    by_token: ClassVar[bool] = False

    def check(self, options):
        pass

    def launch(self, settings, parts, say):
        bound = settings.listen()
        model, tokenizer = parts.open_model()
        [router] = settings.routers.values()
        engine = Plain(parts.compose(model, tokenizer, router, "preparing"), model, tokenizer, settings)
        asyncio.run(listen(engine.app, engine, settings, bound, say))
