"""Requests with different sets in one batch: each as on a model that holds its set alone."""

import pytest
import torch

import spectr
from models import close
from rows import PROMPTS, SETS, alone, composed, ids_of, together
from spectr import Calibrated, compose
from spectr.composition.request_batch import RequestBatch
from text_model import make_model

ROUTERS = [
    spectr.Spectr(top_k=2),
    spectr.Spectr(top_k=3, weights="softmax", combine="ties"),
    spectr.Arrow(top_k=2),
    spectr.Uniform(),
    spectr.Lag(shortlist=1),
    spectr.Lag(shortlist=2, top_k=2, weights="softmax"),
    spectr.Seqr(top_k=2),
    Calibrated(),
    Calibrated(top_k=2, weights="softmax"),
    Calibrated(level="prior"),
    Calibrated(level="token"),
    spectr.Glider(token_router=spectr.Arrow(), alpha=2.0),
    spectr.Glider(token_router=None),
]


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_each_request_of_a_mixed_batch_is_answered_as_where_its_set_is_all_there_is(library, router):
    batch = RequestBatch(composed(library, router))
    model = batch.routed.model
    prompts = [ids_of(prompt) for prompt in PROMPTS]
    decisions = [batch.decide(names, ids) for names, ids in zip(SETS, prompts, strict=True)]
    for logits, names, ids in zip(
        together(model, batch, list(zip(decisions, prompts, strict=True))), SETS, prompts, strict=True
    ):
        close(logits, alone(library, router, names, ids), 2e-5)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_one_request_after_the_other_leaves_nothing_behind(library, router):
    batch = RequestBatch(composed(library, router))
    model = batch.routed.model
    for names, prompt in zip([*SETS, *SETS], [*PROMPTS, *reversed(PROMPTS)], strict=True):
        ids = ids_of(prompt)
        [logits] = together(model, batch, [(batch.decide(names, ids), ids)])
        close(logits, alone(library, router, names, ids), 2e-5)


@pytest.mark.parametrize("router", [Calibrated(), Calibrated(level="prior")], ids=str)
def test_a_request_with_one_expert_has_no_prompt_read(library, router):
    batch = RequestBatch(composed(library, router))
    read = []
    batch.routed.model.register_forward_pre_hook(lambda *_: read.append(1))
    for layer in batch.routed.layers.values():
        layer.base.register_forward_pre_hook(lambda *_: read.append(1))
    batch.decide(("bees",), ids_of(PROMPTS[0]))
    assert not read
    batch.decide(("ants", "bees"), ids_of(PROMPTS[0]))
    assert read


@pytest.mark.parametrize("router", [spectr.Spectr(top_k=2), Calibrated(), Calibrated(level="prior")], ids=str)
def test_after_an_expert_is_discarded_the_others_answer_as_if_it_had_never_been(library, router):
    model, ids = make_model(), ids_of(PROMPTS[1])
    batch = RequestBatch(compose(model, library, router))
    kept = batch.decide(("ants", "bees"), ids)
    batch.discard("cats")
    [logits] = together(model, batch, [(kept, ids)])
    close(logits, alone(library, router, ("ants", "bees"), ids), 2e-5)
    assert batch.routed.experts == ("ants", "bees")


@pytest.mark.parametrize("router", [spectr.Spectr(top_k=2), Calibrated(), Calibrated(level="prior")], ids=str)
def test_what_is_seen_is_what_a_trace_of_the_set_alone_shows(library, router):
    batch = RequestBatch(composed(library, router))
    model = batch.routed.model
    requests = [(batch.decide(names, ids_of(p)), ids_of(p)) for names, p in zip(SETS[:3], PROMPTS[:3], strict=True)]
    ends = torch.tensor([len(ids) for _, ids in requests]).cumsum(0) - 1
    batch.watch(ends.tolist(), layers=True)
    together(model, batch, requests)
    for look, names, (_, ids) in zip(batch.seen(), SETS[:3], requests, strict=True):
        if not names:
            assert look.shares == {}
            continue
        other = make_model()
        compose(other, library, router).allow(names)
        with spectr.trace(other) as trace, torch.no_grad():
            other(input_ids=ids[None])
        for told, layer in zip(look.layers, trace.layers.values(), strict=True):
            scores, weights = (t[0, -1].tolist() for t in layer.steps[-1])
            rows = zip(layer.experts, weights, scores, strict=True)
            expected = {name: pytest.approx((weight, score), rel=1e-4) for name, weight, score in rows if weight}
            assert told == expected
        assert sum(look.shares.values()) == pytest.approx(1, abs=1e-5)


def test_held_weights_need_no_watching_for_their_shares(library):
    model = make_model()
    batch = RequestBatch(compose(model, library, Calibrated(top_k=2)))
    ids = ids_of(PROMPTS[0])
    decision = batch.decide(("ants", "cats"), ids)
    batch.watch([len(ids) - 1], layers=False)
    together(model, batch, [(decision, ids)])
    look = batch.share(decision)
    assert look is not None
    assert look.shares == pytest.approx(batch.seen()[0].shares)
    assert set(look.shares) == {"ants", "cats"}


def test_closing_gives_all_experts_to_every_token_again(library):
    router, ids = Calibrated(), ids_of(PROMPTS[1])
    batch = RequestBatch(composed(library, router))
    model = batch.routed.model
    together(model, batch, [(batch.decide(("bees",), ids), ids)])
    batch.close()
    with torch.no_grad():
        close(model(input_ids=ids[None]).logits[0], alone(library, router, ("ants", "bees", "cats"), ids))
