"""Ways of calling x routers x cache classes, and model families: each sequence is answered as if it were alone.

The oracle is a model with one expert for everything; of routers that mix experts it is the same router with the
prompt's verdict held. Left out, as transformers cannot do it with a plain model on a CPU: beams guided by a negative
prompt (its mask has one row), static caches with an assistant, offloaded caches, and what :data:`sequences.NOT_BUILT`
and the sets above it name. Cacheless families in a loop decide for each call on what it is given.
"""

from __future__ import annotations

import copy
from inspect import signature

import pytest
import torch
import transformers
from recurrent import (
    ALONE,
    FAMILIES,
    NO_BEAMS,
    NOT_BUILT,
    OWN_STATE,
    READS_WHOLE,
    REHASHES,
    REMEMBERS_INSIDE,
    REMEMBERS_NOTHING,
    cache_of,
    families_of_transformers,
    family,
)
from sequences import (
    CACHE_WAYS,
    CACHES,
    FP8_DEPENDS,
    FREE,
    NEW,
    ROUTERS,
    WAYS,
    decided,
    differences,
    make_tokenizer,
    pair,
    prompts_of,
    say,
    step_by_step,
)
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

import spectr
from models import close
from spectr.errors import CompositionError

# All of it for the default router; of each other router each way with one class, and each class with two ways or more.
MATRIX = [(kind, what) for kind in CACHES for what in CACHE_WAYS]
ONE_EXPERT = {"calibrated", "shortlist of one", "global"}


def through(way, model, ids, other):
    """What a way says while another prompt is answered in between."""
    return way(model, ids, other, lambda: model.generate(other, **{**FREE, "max_new_tokens": 1}))


@pytest.mark.parametrize("name", ROUTERS)
def test_ways_of_calling(world, name):
    model, routed = world.routed(ROUTERS[name])
    held, handle = world.routed(ROUTERS[name])
    prompts = prompts_of(routed)
    wrong = []
    (ids, expert), (other, _) = prompts if name != "calibrated" else prompts[::-1]
    handle.prompt.hold(routed.prompt.decide(input_ids=ids))
    oracle = world.oracle(expert) if name in ONE_EXPERT else held
    by_words = isinstance(ROUTERS[name], spectr.Glider)
    for what, way in WAYS.items():
        if not (by_words and what == "embeddings"):
            wrong += differences(what, through(way, model, ids, other), way(oracle, ids, other, lambda: None))
    first = list(ROUTERS).index(name) % len(CACHES)
    for kind, what in MATRIX if name == "calibrated" else MATRIX[first :: len(CACHES)]:
        way, make = CACHE_WAYS[what], CACHES[kind]

        def called(m, x, o, b, way=way, make=make):
            return way(m, x, o, b, make)

        if kind == "fp8" and what in FP8_DEPENDS:  # it runs, and the numbers depend on the first tokens
            assert through(called, model, ids, other).shape[1] == NEW
            continue
        want = called(oracle, ids, other, lambda: None)
        wrong += differences(f"{what}, {kind}", through(called, model, ids, other), want)
    assert not wrong, "\n".join(wrong)


def test_all_families_of_transformers_are_here():
    assert families_of_transformers() - ALONE <= {name.split(",")[0] for name in (*FAMILIES, *NOT_BUILT)}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(tmp_path, name):
    made = family(name, tmp_path)
    model, routed = made.routed()
    (ids, expert), (other, second) = prompts_of(routed)
    oracle = made.oracle(expert)

    def between():
        model.generate(other, **{**FREE, "max_new_tokens": 1})

    want = say(oracle, ids)
    wrong = differences("generate", say(model, ids), want)
    between()
    wrong += differences("use_cache=False", say(model, ids, use_cache=False), say(oracle, ids, use_cache=False))
    if name not in NO_BEAMS:
        wrong += differences("beams", say(model, ids, num_beams=2), say(oracle, ids, num_beams=2))
    if name in REMEMBERS_INSIDE:
        with routed.prompt.using(routed.prompt.decide(input_ids=ids)):
            wrong += differences("a call", model(ids).logits.argmax(-1), oracle(ids).logits.argmax(-1))
    elif name in REMEMBERS_NOTHING:
        for text in (ids, torch.cat([ids, other], 1)):
            alone = made.oracle(decided(routed, text))
            wrong += differences("a call", model(text).logits.argmax(-1), alone(text).logits.argmax(-1))
    else:
        whole = name in READS_WHOLE
        steps = step_by_step(model, ids, between, whole=whole)
        wrong += differences("loop", steps, step_by_step(oracle, ids, lambda: None, whole=whole))
    for rows in (2, len(ids[0])):  # as many as a row has tokens, so that shapes do not tell the axes apart
        batch = torch.cat([ids, other] * (rows // 2))
        logits, alone = model(batch).logits, torch.cat([oracle(ids).logits, made.oracle(second)(other).logits])
        if name not in REHASHES:
            close(logits, alone.repeat(rows // 2, *(1 for _ in alone.shape[1:])), 1e-4)
    if name not in OWN_STATE:
        argument = "cache_params" if "cache_params" in signature(model.forward).parameters else "past_key_values"
        fills = {"empty": None, "begun": ids[:, :3], "filled by another prompt": other}
        for kind, fill in fills.items():
            if name in READS_WHOLE and kind == "begun":
                continue
            cache = cache_of(name, model)
            if fill is not None:
                model(fill, use_cache=True, **{argument: cache})
                cache = copy.deepcopy(cache)
                between()
            wrong += differences(f"{kind} cache", say(model, ids, **{argument: cache}), want)
    assert not wrong, "\n".join(wrong)


def test_assistants(world, shared):
    model, _, ((ids, name), (other, _)) = shared
    another, by_tokens = world.routed(spectr.Calibrated())[0], world.routed(spectr.Spectr(top_k=2))[0]
    want = say(world.oracle(name), ids)
    for assistant in (another, by_tokens, world.base):
        assert torch.equal(say(model, ids, assistant_model=assistant), want)
        say(model, other)
    for main in (world.base, by_tokens):
        assert torch.equal(say(main, ids, assistant_model=model), say(main, ids))


def test_pipeline(world, shared):
    model, _, prompts = shared
    generate = transformers.pipeline("text-generation", model=model, tokenizer=make_tokenizer())
    texts = [" ".join(f"w{i}" for i in ids[0].tolist()) for ids, _ in prompts]
    for size in (1, 2):
        settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
        said = generate(texts, batch_size=size, return_tensors=True, generation_config=settings)
        for [one], (ids, name) in zip(said, prompts, strict=True):
            assert one["generated_token_ids"][-NEW:] == say(world.oracle(name), ids)[0].tolist()


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_encoder_and_decoder(tmp_path, name):
    made = pair(name, tmp_path)
    model, routed = made.routed()
    (ids, expert), (other, second) = prompts_of(routed)
    oracle, begin, wrong = made.oracle(expert), torch.tensor([[0, 7, 9]]), []

    def cache():
        return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))

    def loop(model, between, **given):
        state, said = cache(), [torch.zeros(1, 1, dtype=torch.long)]
        for _ in range(NEW):
            said.append(model(decoder_input_ids=said[-1], past_key_values=state, **given).logits[:, -1:].argmax(-1))
            between()
        return torch.cat(said, 1)

    def between():
        model.generate(other, **{**FREE, "max_new_tokens": 1})

    used = cache()
    model.generate(other, past_key_values=used, **FREE)
    want, options = say(oracle, ids), {"cache_implementation": "static"}
    wrong += differences("generate", say(model, ids), want)
    wrong += differences("use_cache=False", say(model, ids, use_cache=False), want)
    wrong += differences("static", say(model, ids, **options), want)
    wrong += differences("beams", say(model, ids, num_beams=2), say(oracle, ids, num_beams=2))
    wrong += differences("empty cache", say(model, ids, past_key_values=cache()), want)
    wrong += differences("cache of another prompt", say(model, ids, past_key_values=used), want)
    wrong += differences("assisted", say(model, ids, assistant_model=copy.deepcopy(made.base)), want)
    encoded, plain = model.get_encoder()(input_ids=ids), oracle.get_encoder()(input_ids=ids)
    between()
    wrong += differences("encoded before", model.generate(encoder_outputs=copy.copy(encoded), **FREE)[:, -NEW:], want)
    wrong += differences(
        "loop", loop(model, between, encoder_outputs=encoded), loop(oracle, lambda: None, input_ids=ids)
    )
    batch = torch.cat([ids, other])
    wrong += differences("batch", say(model, batch)[1:], say(made.oracle(second), other))
    assert not wrong, "\n".join(wrong)
    target = oracle(input_ids=ids, decoder_input_ids=begin).logits
    close(encoded.last_hidden_state, plain.last_hidden_state)
    close(model(input_ids=ids, decoder_input_ids=begin).logits, target)
    close(model(encoder_outputs=encoded, decoder_input_ids=begin).logits, target)
    close(
        model.get_decoder()(input_ids=begin, encoder_hidden_states=encoded[0])[0],
        oracle.get_decoder()(input_ids=begin, encoder_hidden_states=plain[0])[0],
    )
    routed.allow([second])
    with pytest.raises(CompositionError):  # other experts encoded it
        model(encoder_outputs=encoded, decoder_input_ids=begin)
