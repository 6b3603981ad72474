"""A decision belongs to a sequence: ways of calling x routers x cache classes, each as the sequence is alone.

The oracle is a model with one expert for everything; of routers that mix experts it is the same router with the
prompt's verdict held. Left out, as transformers cannot do it with a plain model on a CPU: beams guided by a negative
prompt (its mask has one row), static caches with an assistant, offloaded caches, and what :data:`sequences.NOT_BUILT`
and the sets above it name. Cacheless families in a loop decide for each call on what it is given.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import pytest
import torch
import transformers
from sequences import (
    CACHE_WAYS,
    CACHES,
    FAMILIES,
    FP8_DEPENDS,
    FREE,
    NEW,
    NO_BEAMS,
    OWN_STATE,
    READS_WHOLE,
    REHASHES,
    REMEMBERS_INSIDE,
    REMEMBERS_NOTHING,
    ROUTERS,
    WAYS,
    World,
    decided,
    family,
    make_tokenizer,
    pair,
    prompts_of,
    say,
    step_by_step,
)
from torch.testing import assert_close
from transformers import ContinuousBatchingConfig, DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache

import spectr
from models import close, tiny_llama, tokens, types_unchecked
from spectr.errors import CompositionError
from spectr.layers.batch_routing import thread
from spectr.prompts import calls, frames

ONE_EXPERT = {"calibrated", "shortlist of one", "global"}
SEVEN = torch.tensor([[7]])


@pytest.fixture(autouse=True)
def no_gradients(request):
    with torch.set_grad_enabled("gradients" in request.fixturenames), types_unchecked():
        yield
    assert thread.routing is None
    assert not frames._frames.get()


@pytest.fixture
def gradients():
    """The test needs gradients."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with torch.no_grad():
        return World(tiny_llama(), tmp_path_factory.mktemp("llama"), calibrated=True)


@pytest.fixture(scope="module")
def shared(world):
    """A model that is used by all, and two prompts that it gives different experts."""
    with torch.no_grad():
        model, routed = world.routed(spectr.Calibrated())
        return model, routed, prompts_of(routed)


def differences(what, got, want):
    """A line for the report, where something is not as it should be."""
    same = got.shape == want.shape and torch.equal(got, want)
    return [] if same else [f"{what}: {got.tolist()} in place of {want.tolist()}"]


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
    kinds = CACHES if name == "calibrated" else {"DynamicCache(config)": CACHES["DynamicCache(config)"]}
    for kind, make in kinds.items():
        for what, way in CACHE_WAYS.items():

            def called(m, x, o, b, way=way, make=make):
                return way(m, x, o, b, make)

            if kind == "fp8" and what in FP8_DEPENDS:  # it runs, and the numbers depend on the first tokens
                assert through(called, model, ids, other).shape[1] == NEW
                continue
            want = called(oracle, ids, other, lambda: None)
            wrong += differences(f"{what}, {kind}", through(called, model, ids, other), want)
    assert not wrong, "\n".join(wrong)


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
            cache = DynamicCache(config=model.config)
            if fill is not None:
                model(fill, use_cache=True, **{argument: cache})
                cache = copy.deepcopy(cache)
                between()
            wrong += differences(f"{kind} cache", say(model, ids, **{argument: cache}), want)
    assert not wrong, "\n".join(wrong)


def test_batches_whose_rows_have_different_experts(world, shared):
    model, routed, ((a, one), (b, two)) = shared
    both = torch.cat([a, b])
    short = b[:, :4]
    right, left = (torch.nn.functional.pad(short, pad) for pad in ((0, 2), (2, 0)))
    third = decided(routed, short)

    def alone(**options):
        return torch.cat([say(world.oracle(name), ids, **options) for ids, name in ((a, one), (b, two))])

    for options in ({}, {"num_beams": 2}, {"guidance_scale": 1.5}, {"use_cache": False}, {"prefill_chunk_size": 2}):
        assert torch.equal(say(model, both, **options), alone(**options)), options
    negative = say(model, both, guidance_scale=1.5, negative_prompt_ids=both.flip(0))
    assert torch.equal(negative[:1], say(world.oracle(one), a, guidance_scale=1.5, negative_prompt_ids=b))
    several = model.generate(both, **{**FREE, "num_beams": 2, "num_return_sequences": 2})
    assert torch.equal(
        several[2:], world.oracle(two).generate(b, **{**FREE, "num_beams": 2, "num_return_sequences": 2})
    )
    cache = DynamicCache(config=model.config)
    model(both[:, :3], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert torch.equal(say(model, both, num_beams=2, past_key_values=cache), alone(num_beams=2))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    padded = say(model, torch.cat([a, left]), attention_mask=mask)
    assert torch.equal(padded, torch.cat([say(world.oracle(one), a), say(world.oracle(third), short)]))
    logits = model(torch.cat([a, right]), attention_mask=mask.flip(1)).logits
    close(logits[1:, :4], world.oracle(third)(short).logits)
    close(logits[:1], world.oracle(one)(a).logits)


def test_packed_rows(world, shared):
    model, routed, ((a, one), (b, two)) = shared
    row, places = torch.cat([a, b], 1), torch.arange(6).repeat(2)[None]
    want = torch.cat([world.oracle(one)(a).logits, world.oracle(two)(b).logits], 1)
    ends = torch.tensor([0, 6, 12], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
    for options in ({}, lengths):
        close(model(row, position_ids=places, use_cache=False, **options).logits, want)
    close(model(row, position_ids=places, use_cache=False, logits_to_keep=3).logits, want[:, -3:])
    close(model.lm_head(model.model(row, position_ids=places, use_cache=False).last_hidden_state), want)
    with routed.prompt.using(routed.prompt.decide(input_ids=b)):
        close(model(row, position_ids=places, use_cache=False).logits[:, 6:], want[:, 6:])


def test_a_conversation_goes_on(world, shared):
    """A second turn, of the same or of another expert, on the first turn's cache."""
    model, routed, ((a, _), (b, _)) = shared
    experts = set()
    first = DynamicCache(config=model.config)
    said = model.generate(a, past_key_values=first, **FREE)
    for seed in range(60):
        cache = copy.deepcopy(first)
        turn = torch.cat([said, b.repeat(1, 6)[:, : 1 + seed % 36] if seed else a], 1)
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


def test_assistants(world, shared):
    model, _, ((ids, name), (other, _)) = shared
    another, by_tokens = world.routed(spectr.Calibrated())[0], world.routed(spectr.Spectr(top_k=2))[0]
    want = say(world.oracle(name), ids)
    for assistant in (another, by_tokens, world.base):
        assert torch.equal(say(model, ids, assistant_model=assistant), want)
        say(model, other)
    for main in (world.base, by_tokens):
        assert torch.equal(say(main, ids, assistant_model=model), say(main, ids))


def test_threads_and_tasks(world, shared):
    model, routed, prompts = shared
    (a, one), (_, two) = prompts
    want = {(name, n): say(world.oracle(name), ids) for name in (one, two) for n, (ids, _) in enumerate(prompts)}
    verdicts = [routed.prompt.decide(input_ids=ids) for ids, _ in prompts]
    before = {name: {key: id(value) for key, value in vars(layer).items()} for name, layer in routed.layers.items()}

    def rounds(n):
        for _ in range(3):
            assert torch.equal(say(model, prompts[n % 2][0]), want[prompts[n % 2][1], n % 2])

    def using(n):
        with routed.prompt.using(verdicts[n % 2]):
            assert torch.equal(say(model, a), want[prompts[n % 2][1], 0])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(torch.no_grad()(rounds), range(8)))
        list(pool.map(torch.no_grad()(using), range(8)))

    async def task(n):
        with routed.prompt.using(verdicts[1 - n % 2]):
            await asyncio.sleep(0.002 * (n % 3))
            assert torch.equal(say(model, prompts[n % 2][0]), want[prompts[1 - n % 2][1], n % 2])
            said = await asyncio.to_thread(torch.no_grad()(say), model, prompts[n % 2][0])
            assert torch.equal(said, want[prompts[1 - n % 2][1], n % 2])

    async def plain(n):
        await asyncio.sleep(0.001)
        rounds(n)
        await asyncio.to_thread(torch.no_grad()(rounds), n)

    async def together():
        await asyncio.gather(*(way(n) for n in range(3) for way in (task, plain)))

    asyncio.run(together())
    after = {name: {key: id(value) for key, value in vars(layer).items()} for name, layer in routed.layers.items()}
    assert after == before


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
    for how in ("loop", "whole", "new tokens alone", "other model"):
        cache = DynamicCache(config=model.config)
        (world.base if how == "other model" else model)(ids[:, :5], past_key_values=cache)
        routed.allow(["ants", "bees"])
        if how == "loop":
            got, want = (out.logits[:, -1].argmax(-1) for out in (model(ids[:, 5:], past_key_values=cache), some(ids)))
        elif how == "new tokens alone":
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


def test_changes_while_others_generate(world, shared):
    """Calls that wait for a change go on with the experts that there are then, and do not keep the change waiting."""
    (ids, one), (_, two) = shared[2]
    model, routed = world.routed(spectr.Calibrated())
    answers = [say(world.oracle(name), ids).tolist() for name in (one, two)]
    wrong, stop = [], threading.Event()

    @torch.no_grad()
    def generate():
        while not stop.is_set():
            try:
                said = say(model, ids).tolist()
                wrong.extend([] if said in answers else [said])
            except Exception as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=generate) for _ in range(4)]
    for one_of_them in threads:
        one_of_them.start()
    try:
        for _ in range(5):
            routed.allow([two])
            routed.allow(None)
    finally:
        stop.set()
        for one_of_them in threads:
            one_of_them.join()
    assert not wrong

    class Streamer:
        def put(self, value):
            with pytest.raises(CompositionError):
                routed.allow([two])

        def end(self):
            self.inner = say(model, shared[2][1][0])

    assert say(model, ids, streamer=(streamer := Streamer())).tolist() == answers[0]
    assert torch.equal(streamer.inner, say(world.oracle(one), shared[2][1][0]))  # a generate inside another inherits


def test_continuous_batching(world, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # as each manager's end does, which takes longer than all else here
    model, routed = world.routed(spectr.Calibrated())
    (a, one), (b, two) = prompts_of(routed)
    inputs, verdicts = [a[0].tolist(), b[0].tolist()], [routed.prompt.decide(input_ids=ids) for ids in (a, b)]
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)

    def batch(returned=1, **more):
        sampling = {"do_sample": True, "top_k": 1, "num_return_sequences": returned}
        settings = GenerationConfig(max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0, **sampling)
        said = model.generate_batch(inputs, settings, small, warmup=False, **more)
        return sorted(output.generated_tokens for output in said.values())

    def want(*names, times=1):
        return sorted(
            times * [say(world.oracle(name), ids)[0].tolist() for name, ids in zip(names, (a, b), strict=True)]
        )

    assert batch() == want(one, two)
    assert batch(returned=2) == want(one, two, times=2)
    with routed.prompt.using(verdicts[1]):
        assert batch() == want(two, two)
    with routed.prompt.using(torch.cat(verdicts[::-1])):
        assert batch() == want(two, one)
    routed.prompt.hold(verdicts[0])
    assert batch() == want(one, one)
    routed.prompt.hold(None)
    assert batch(persistent_manager=True) == want(one, two)
    routed.allow([two])
    assert batch(persistent_manager=True) == want(two, two)
    routed.allow(None)
    model.destroy_cached_continuous_batching_manager()
    settings = GenerationConfig(max_new_tokens=30, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(settings, continuous_batching_config=small, warmup=False) as manager:
        for ids in (a, b, a):  # a name that is used again is another request
            manager.add_request(ids[0].tolist(), request_id="again", max_new_tokens=NEW)
            said = manager.get_result("again", timeout=30).generated_tokens
            assert said == say(world.oracle(decided(routed, ids)), ids)[0].tolist()
        manager.add_request(a[0].tolist(), request_id="long", streaming=True)
        next(iter(manager.request_id_iter("long")))
        with pytest.raises(CompositionError):
            routed.allow([two])
    assert torch.equal(say(model, a), say(world.oracle(one), a))


def test_pipeline(world, shared):
    model, _, prompts = shared
    generate = transformers.pipeline("text-generation", model=model, tokenizer=make_tokenizer())
    texts = [" ".join(f"w{i}" for i in ids[0].tolist()) for ids, _ in prompts]
    for size in (1, 2):
        settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
        said = generate(texts, batch_size=size, return_tensors=True, generation_config=settings)
        for [one], (ids, name) in zip(said, prompts, strict=True):
            assert one["generated_token_ids"][-NEW:] == say(world.oracle(name), ids)[0].tolist()


def gradients_of(model, ids):
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_gradient_checkpointing(gradients, world, shared):
    (a, one), (b, two) = shared[2]
    want = [gradients_of(world.oracle(name), ids) for ids, name in ((a, one), (b, two))]
    for reentrant in (None, True, False):
        model, routed = world.routed(spectr.Calibrated())
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        got = gradients_of(model, torch.cat([a, b]))
        assert got.keys() == want[0].keys()
        for name in got:
            close(got[name], (want[0][name] + want[1][name]) / 2, 1e-4)
        routed.allow([two])  # with checkpointing on
        got = gradients_of(model, b)
        for name in got:
            close(got[name], want[1][name], 1e-4)
    model.train()
    model.zero_grad()
    loss = model(input_ids=b, labels=b).loss
    backward = threading.Thread(target=loss.backward)
    backward.start()
    backward.join()
    for name, value in model.named_parameters():
        if value.grad is not None:
            close(value.grad, want[1][name], 1e-4)


@pytest.mark.parametrize(
    "router", [spectr.Calibrated(), spectr.Calibrated(top_k=2), spectr.Calibrated(level="prior")], ids=repr
)
def test_gradients_after_inference_mode(gradients, world, shared, router):
    both = torch.cat([ids for ids, _ in shared[2]])
    want = gradients_of(world.routed(router)[0], both)
    model, _ = world.routed(router)
    with torch.inference_mode():  # decides alike, and what is kept of that is used again
        model(input_ids=both)
        model.generate(both, max_new_tokens=2)
    got = gradients_of(model, both)
    assert got.keys() == want.keys()
    for name in got:
        close(got[name], want[name], 1e-5)


def test_trainer(gradients, world, shared, tmp_path):
    model, _ = world.routed(spectr.Calibrated())
    rows = [{"input_ids": ids[0], "labels": ids[0]} for ids, _ in shared[2]]
    settings = transformers.TrainingArguments(
        **{"output_dir": tmp_path, "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.0},
        **{"report_to": [], "activation_checkpointing": True, "use_cpu": True, "disable_tqdm": True},
        **{"save_strategy": "no", "logging_strategy": "no", "dataloader_pin_memory": False},
    )
    loss = transformers.Trainer(model=model, args=settings, train_dataset=rows).train().training_loss
    alone = [world.oracle(name)(input_ids=ids, labels=ids).loss.item() for ids, name in shared[2]]
    assert loss == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_copies_of_the_model(world, shared):
    (a, one), (_, two) = shared[2]
    model, routed = world.routed(spectr.Calibrated())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for ids, name in shared[2]:
            assert torch.equal(say(copied, ids), say(world.oracle(name), ids))
    copied, handle = copy.deepcopy((model, routed))
    handle.allow([two])
    assert torch.equal(say(copied, a), say(world.oracle(two), a))
    assert torch.equal(say(model, a), say(world.oracle(one), a))


def test_others_wrap_the_model_too(world, shared):
    """Accelerate's hooks, put on before or after; they are there after a change and after ``remove``."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    (a, one), (_, two) = shared[2]
    for first in (True, False):
        model = copy.deepcopy(world.base)
        if first:
            add_hook_to_module(model, ModelHook())
        routed = spectr.compose(model, world.library, spectr.Calibrated())
        if not first:
            add_hook_to_module(model, ModelHook())
        hooked = model._old_forward
        for names, expert in ((None, one), ([two], two), (None, one)):
            routed.allow(names)
            assert torch.equal(say(model, a), say(world.oracle(expert), a))
        routed.remove()
        assert model._old_forward is hooked
        remove_hook_from_module(model)
        assert torch.equal(say(model, a), say(world.base, a))


def test_nothing_is_left_where_a_call_fails(world, shared):
    model, routed, ((ids, name), _) = shared

    def fail(*_):
        raise RuntimeError("no memory")

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    for call in (lambda: say(model, ids), lambda: model(ids), lambda: model.model(ids)):
        with pytest.raises(RuntimeError, match="no memory"):
            call()
    hook.remove()
    assert thread.routing is None
    assert not calls._stack.inside
    assert not routed._exclusion._running
    assert torch.equal(say(model, ids), say(world.oracle(name), ids))


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


def test_a_compiled_model(world, tmp_path):
    """Decisions are made outside of the graphs."""
    small = World(tiny_llama(num_hidden_layers=1), tmp_path, ["q_proj", "down_proj"])
    model, routed = small.routed()
    compiled = torch.compile(model, backend="eager")
    for ids, name in prompts_of(routed):
        close(compiled(ids, use_cache=False).logits, small.oracle(name)(ids).logits)
        assert torch.equal(say(compiled, ids), say(small.oracle(name), ids))


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
