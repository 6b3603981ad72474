"""Live servers with several routers, which requests name: one at a time, and together in a batch."""

import gc
import weakref

import httpx
import openai
import pytest
from openai import OpenAI

import spectr
from asking import MODES, PROMPTS, SETS, alike, answers, ask, open_to
from serving import ADMIN, ALL, POLICY, served
from spectr import Calibrated
from spectr.composition import Paged

ROUTERS = {
    "calibrated": Calibrated(),
    "spectr": spectr.Spectr(top_k=2),
    "arrow": spectr.Arrow(top_k=2),
    "calibrated-prior": Calibrated(level="prior"),
    "lag": spectr.Lag(shortlist=2),
    "shortlist": spectr.Shortlist(size=2),
}
ASKED = PROMPTS[:3]


@pytest.fixture(scope="module", params=MODES)
def server(request, library):
    with served(library, ROUTERS, batching=MODES[request.param]()) as (address, engine):
        yield address, engine


@pytest.fixture(scope="module")
def client(server):
    with open_to(server[0]) as client:
        yield client


@pytest.fixture(scope="module")
def expected(library):
    """By router and set what a server says that has no other."""
    found = {}
    for number, (name, router) in enumerate(ROUTERS.items()):
        for names in (SETS[number % len(SETS)], SETS[(number + 1) % len(SETS)]):
            with served(library, {name: router}, names=names) as (address, _):
                for prompt, answer in zip(ASKED, answers(address, [(p, {}) for p in ASKED], False), strict=True):
                    found[prompt, name, names] = answer
    return found


@pytest.mark.parametrize("at_once", [True, False])
def test_a_request_is_answered_as_by_a_server_of_its_router_and_set_alone(server, expected, at_once):
    address, engine = server
    together, set_tokens = [], engine.scheduler.router_batch.set_tokens

    def watched(spans):
        together.append({decision.router for decision, _ in spans if decision.experts})
        set_tokens(spans)

    engine.scheduler.router_batch.set_tokens = watched
    order = sorted(expected, key=lambda request: PROMPTS.index(request[0]))  # routers and sets side by side
    given = [(prompt, {"router": router, "experts": list(names)}) for prompt, router, names in order]
    try:
        for answer, request in zip(answers(address, given, at_once), order, strict=True):
            alike(answer, expected[request])
    finally:
        engine.scheduler.router_batch.set_tokens = set_tokens
    mixed = max(map(len, together))
    assert (mixed > 2) if engine.batching is not None and at_once else mixed == 1
    assert len({expected[request][0] for request in order if request[0] == PROMPTS[1]}) > 1


def test_the_first_router_is_the_default(client):
    told = client.models.retrieve("spectr").model_dump()
    assert told["routers"] == list(ROUTERS)
    by_default, named = (
        ask(client, PROMPTS[1], return_routing="layers", **given) for given in ({}, {"router": "calibrated"})
    )
    assert by_default.choices[0].message.content == named.choices[0].message.content
    assert by_default.choices[0].routing == named.choices[0].routing


@pytest.mark.parametrize("router", ROUTERS)
def test_streams_carry_the_text_and_the_routing_of_their_router(client, router):
    whole = ask(client, PROMPTS[1], return_routing=True, router=router).choices[0]
    chunks = list(ask(client, PROMPTS[1], stream=True, return_routing=True, router=router))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    tokens = [token for chunk in chunks for token in chunk.choices[0].routing["tokens"]]
    assert tokens == whole.routing["tokens"]


@pytest.mark.parametrize("router", ["glider", "spektr", ""])
def test_a_router_that_is_not_served_is_refused_and_the_others_are_named(client, router):
    with pytest.raises(openai.BadRequestError, match=f"router '{router}' is not served") as caught:
        ask(client, "no", router=router)
    assert (caught.value.code, caught.value.param) == ("router_not_served", "router")
    assert all(name in str(caught.value) for name in ROUTERS)


@pytest.mark.parametrize("mode", MODES)
def test_a_removed_expert_is_gone_from_every_router_and_from_memory(library, mode):
    with served(library, ROUTERS, policy=POLICY, batching=MODES[mode]()) as (address, engine):
        requests = [(PROMPTS[1], {"router": name, "experts": ["ants", "bees"]}) for name in ROUTERS]
        before = answers(address, requests, False)
        compositions = engine.composed.compositions.values()
        layers = [layer for routed in compositions for layer in routed.layers.values() if layer.experts]
        factors = [weakref.ref(layer.A_PI) for layer in layers]
        del layers
        told = httpx.delete(f"{address}/v1/experts/cats", headers={"authorization": f"Bearer {ADMIN}"}, timeout=30)
        assert told.json()["deleted"] is True, told.text
        with OpenAI(base_url=f"{address}/v1", api_key=ALL, max_retries=0) as client:
            for name in ROUTERS:
                with pytest.raises(openai.NotFoundError):
                    ask(client, "no", experts=["cats"], router=name)
        for answer, other in zip(
            answers(address, [(p, {"router": g["router"]}) for p, g in requests], True), before, strict=True
        ):
            alike(answer, other)
        gc.collect()
        assert not [found for found in factors if found() is not None]
        for routed in compositions:
            held = {layer.experts for layer in routed.layers.values()}
            paged = isinstance(routed, Paged)
            assert "cats" not in routed.expert_cache.experts if paged else held == {("ants", "bees")}
