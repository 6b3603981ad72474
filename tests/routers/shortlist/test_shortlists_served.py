"""Requests with shortlists of their own in one batch: each as where its set is the whole library."""

import pytest
import torch

import spectr
from models import close, logits
from rows import together
from scaling import PROMPTS, ids_of, routed_model
from spectr import Arrow, Calibrated, Lag, Shortlist, Spectr, Uniform, compose
from spectr.composition.multi_router import MultiRouter
from spectr.composition.request_batch import RequestBatch
from spectr.composition.router_batch import RouterBatch
from text_model import make_model

ALL = ("ants", "bees", "cats", "dogs", "eels", "foxes", "wasp")
SETS = [
    ALL,
    ("bees", "dogs", "eels", "foxes", "wasp"),
    ("cats", "wasp"),
    (),
    ("wasp",),
    ("ants", "bees", "cats", "dogs"),
]
SHORTLISTS = [
    Shortlist(size=1),
    Shortlist(size=1, module_stride=3),
    Shortlist(size=1, modules=("q_proj",), module_stride=2),
    Shortlist(size=3),
    Shortlist(size=3, module_stride=2),
    Shortlist(size=3, token_router=Spectr(top_k=2, weights="softmax")),
    Shortlist(size=2, token_router=Uniform()),
    Shortlist(size=3, token_router=Lag(shortlist=2, top_k=1)),
    Shortlist(size=4, token_router=Calibrated(level="token", top_k=2)),
]


def alone(library, names, router, ids):
    if not names:
        return logits(make_model(), ids)[0]
    model, routed = routed_model(library, router)
    routed.allow(names)
    return logits(model, ids)[0]


def requests_of(batch, router=None):
    given = (router,) if router else ()
    prompts = [ids_of(PROMPTS[number % len(PROMPTS)]) for number in range(len(SETS))]
    return [(names, ids, batch.decide(*given, names, ids[0])) for names, ids in zip(SETS, prompts, strict=True)]


@pytest.mark.parametrize("router", SHORTLISTS, ids=str)
def test_each_request_has_its_own_shortlist_of_its_own_set(library, router):
    model, routed = routed_model(library, router)
    batch = RequestBatch(routed)
    requests = requests_of(batch)
    found = together(model, batch, [(decision, ids[0]) for _, ids, decision in requests])
    for mine, (names, ids, decision) in zip(found, requests, strict=True):
        close(mine, alone(library, names, router, ids), 1e-4)
        assert int((decision.verdict_E != 0).sum()) == min(router.size, len(names))
    for names, ids, decision in reversed(requests):
        [mine] = together(model, batch, [(decision, ids[0])])
        close(mine, alone(library, names, router, ids), 1e-4)


def held(batch, decision):
    """The experts whose factors the layers have for a call of this rule."""
    batch.set_tokens([(decision, 1)])
    return {name for factors in batch.routing().factors.values() for name in factors.experts}


@pytest.mark.parametrize("size", [1, 2])
def test_the_layers_hold_only_what_running_requests_have_chosen(library, size):
    _, routed = routed_model(library, Shortlist(size=size))
    batch = RequestBatch(routed)
    kept = batch.decide(("bees", "cats"), ids_of(PROMPTS[1])[0])
    chosen = {name for name, weight in zip(routed.experts, kept.verdict_E, strict=True) if weight}
    assert held(batch, kept) == chosen
    for names in (("ants",), ("dogs",), ("eels",)):
        others = chosen if size > 1 else set()
        assert held(batch, batch.decide(names, ids_of(PROMPTS[0])[0])) == others | set(names)


@pytest.mark.parametrize("router", [Shortlist(size=1), Shortlist(size=2)], ids=str)
def test_an_expert_that_is_discarded_is_on_no_shortlist(library, router):
    model, routed = routed_model(library, router)
    batch = RequestBatch(routed)
    kept, ids = batch.decide(("ants", "bees", "dogs"), ids_of(PROMPTS[1])[0]), ids_of(PROMPTS[1])
    batch.discard("foxes")
    [mine] = together(model, batch, [(kept, ids[0])])
    close(mine, alone(library, ("ants", "bees", "dogs"), router, ids), 1e-4)
    fresh = batch.decide(routed.experts, ids[0])
    [mine] = together(model, batch, [(fresh, ids[0])])
    close(mine, alone(library, tuple(name for name in ALL if name != "foxes"), router, ids), 1e-4)


def test_what_is_seen_is_what_a_trace_of_the_set_alone_shows(library):
    router = Shortlist(size=2, token_router=Spectr(top_k=1))
    model, routed = routed_model(library, router)
    batch = RequestBatch(routed)
    requests = [request for request in requests_of(batch) if request[0]]
    ends = torch.tensor([ids.shape[1] for _, ids, _ in requests]).cumsum(0) - 1
    batch.watch(ends.tolist(), layers=True)
    together(model, batch, [(decision, ids[0]) for _, ids, decision in requests])
    for look, (names, ids, _) in zip(batch.seen(), requests, strict=True):
        other, theirs = routed_model(library, router)
        theirs.allow(names)
        with spectr.trace(other) as trace, torch.no_grad():
            other(input_ids=ids)
        told = dict(zip(routed.layers, look.layers, strict=True))
        for module, layer in trace.items():
            scores, weights = (t[0, -1].tolist() for t in layer.steps[-1])
            rows = zip(layer.experts, weights, scores, strict=True)
            assert told.pop(module) == {n: pytest.approx((w, s), rel=1e-4, abs=1e-5) for n, w, s in rows if w}
        assert not any(told.values())  # of layers that none of the set adapts


def test_of_a_shortlist_of_one_the_shares_need_no_watching(library):
    model, routed = routed_model(library, Shortlist(size=1))
    batch = RequestBatch(routed)
    for names, ids, decision in requests_of(batch):
        batch.watch([ids.shape[1] - 1], layers=False)
        together(model, batch, [(decision, ids[0])])
        assert batch.share(decision).shares == pytest.approx(batch.seen()[0].shares)
        assert len(batch.share(decision).shares) == min(1, len(names))


def test_shortlists_next_to_other_routers(library):
    routers = {"shortlist": Shortlist(size=2), "arrow": Arrow(top_k=2), "one": Shortlist(size=1)}
    makers = {name: lambda model, router=router: compose(model, library, router) for name, router in routers.items()}
    batch = RouterBatch(MultiRouter(make_model(), makers))
    requests = [(name, *request) for name in routers for request in requests_of(batch, name)]
    found = together(batch.multi_router.model, batch, [(decision, ids[0]) for *_, ids, decision in requests])
    for mine, (name, names, ids, _) in zip(found, requests, strict=True):
        close(mine, alone(library, names, routers[name], ids), 1e-4)
