"""A cache keeps the decision that it was filled under, and never changes the answer."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from sequences import CACHES, FREE, ROUTERS, SEVEN, decided, differences, say
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

import spectr
from models import close, tokens
from spectr.errors import CompositionError


def test_a_conversation_goes_on(world, shared):
    """A second turn, of the same or of another expert, on the first turn's cache."""
    model, routed, ((a, _), (b, _)) = shared
    experts = set()
    first = DynamicCache(config=model.config)
    said = model.generate(a, past_key_values=first, **FREE)
    for seed in range(60):
        cache = copy.deepcopy(first)
        draw = torch.Generator().manual_seed(seed)
        words = torch.randint(3, 40, (1, 1 + seed % 36), generator=draw)
        turn = torch.cat([said, words if seed else a], 1)
        expert = decided(routed, turn)
        if expert in experts:
            continue
        experts.add(expert)
        model.generate(b, **FREE)
        want = say(world.oracle(expert), turn)
        assert torch.equal(say(model, turn, past_key_values=copy.deepcopy(cache)), want)
        for options in ({"assistant_model": world.base}, {"prompt_lookup_num_tokens": 2}):
            assert torch.equal(say(model, turn, past_key_values=copy.deepcopy(cache), **options), want), options
    assert len(experts) > 1


@pytest.mark.parametrize("kind", [kind for kind in CACHES if kind not in ("static", "fp8")])
def test_a_record_follows_its_cache(world, shared, kind):
    model, _, ((a, one), (b, two)) = shared
    filled = CACHES[kind](model)
    model(torch.cat([a, b]), past_key_values=filled)

    def want(name, ids):
        return world.oracle(name)(torch.cat([ids, SEVEN], 1)).logits[0, -1]

    first, second = want(one, a), want(two, b)
    changes = {
        "deepcopy": (lambda cache: None, [first, second]),
        "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [second, first]),
        "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [second]),
        "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [first, first, second, second]),
    }
    for what, (change, rows) in changes.items():
        cache = copy.deepcopy(filled)
        change(cache)
        got = model(SEVEN.expand(len(rows), 1), past_key_values=cache).logits[:, -1]
        assert_close(got, torch.stack(rows), rtol=0, atol=1e-4, msg=lambda text, what=what: f"{what}: {text}")
    for cache in (pickle.loads(pickle.dumps(filled)), copy.copy(filled)):
        close(model(SEVEN.expand(2, 1), past_key_values=cache).logits[:, -1], torch.stack([first, second]))
    cache = CACHES[kind](model)
    model(a, past_key_values=cache)
    cache.reset()
    close(model(b, past_key_values=cache).logits, world.oracle(two)(b).logits)
    cache.crop(-2)
    got = model(a[:, :2], past_key_values=cache).logits[0, -1]
    close(got, world.oracle(two)(torch.cat([b[:, :4], a[:, :2]], 1)).logits[0, -1])


def test_static_caches_are_used_again(world, shared):
    model, _, prompts = shared
    cache = StaticCache(config=model.config, max_cache_len=40)
    for ids, name in [*prompts, *prompts]:
        assert torch.equal(say(model, ids, past_key_values=cache), say(world.oracle(name), ids))
    cache.reset()
    (ids, name) = prompts[1]
    close(model(ids, past_key_values=cache).logits, world.oracle(name)(ids).logits)


def test_holding(world, shared):
    model, routed, ((a, one), (b, two)) = shared
    cache, first = DynamicCache(config=model.config), routed.prompt.decide(input_ids=a)
    try:
        routed.prompt.hold(routed.prompt.decide(input_ids=b))
        assert torch.equal(say(model, a), say(world.oracle(two), a))
        model(a, past_key_values=cache)
        routed.prompt.hold(None)
        text = torch.cat([a, SEVEN], 1)
        close(model(SEVEN, past_key_values=cache).logits[0, -1], world.oracle(two)(text).logits[0, -1])
        routed.prompt.hold(first.bfloat16())
        text = torch.cat([text, SEVEN], 1)
        close(model(SEVEN, past_key_values=cache).logits[0, -1], world.oracle(one)(text).logits[0, -1])
    finally:
        routed.prompt.hold(None)


@pytest.mark.parametrize(
    "router", [spectr.Spectr(top_k=2), spectr.Arrow(top_k=2), *map(ROUTERS.get, ("calibrated", "prior"))]
)
def test_a_cache_has_no_forbidden_expert(world, router):
    (model, routed), (some, handle) = world.routed(router), world.routed(router)
    handle.allow(["ants", "bees"])
    ids = torch.arange(5, 12)[None]
    wrong = []
    for how in ("loop", "whole", "only new tokens", "other model"):
        cache = DynamicCache(config=model.config)
        (world.base if how == "other model" else model)(ids[:, :5], past_key_values=cache)
        routed.allow(["ants", "bees"])
        if how == "loop":
            got, want = (out.logits[:, -1].argmax(-1) for out in (model(ids[:, 5:], past_key_values=cache), some(ids)))
        elif how == "only new tokens":
            mask = torch.ones_like(ids)
            got, want = say(model, ids[:, 5:], attention_mask=mask, past_key_values=cache), say(some, ids)
        else:
            got, want = say(model, ids, past_key_values=cache), say(some, ids)
        wrong += differences(how, got, want)
        routed.allow(None)
    cache = DynamicCache(config=model.config)
    world.base(ids, past_key_values=cache)
    with pytest.raises(CompositionError):  # nobody knows its tokens
        model(SEVEN, past_key_values=cache)
    assert not wrong, "\n".join(wrong)


def test_sequences_that_live_keep_no_factors(world):
    model, routed = world.routed(spectr.Calibrated(top_k=2))
    caches = []
    for seed in range(20):
        caches.append(DynamicCache(config=model.config))
        model(tokens(1, 4, seed), past_key_values=caches[-1])
    sets = routed.prompt.sets
    assert len(sets._tables) <= sets.gathered
    assert len(routed._calls._routings) <= sets.gathered
    [table] = [weakref.ref(next(iter(table.values())).A_PI) for _, table in list(sets._tables.values())[:1]]
    routed.remove()
    del sets
    gc.collect()
    assert table() is None
    assert len(caches) == 20
