"""A router that decides once for a whole prompt, inside vLLM: as in transformers, for each set as if it were alone."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest
import torch
from command import save_tokenizer
from engine import tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectr
from spectr.composed import Settings
from spectr.errors import CompositionError
from spectr.library import LibraryStore
from spectr.serving.engines.vllm import launched
from spectr.serving.gateway import Gateway

ROUTER = {"name": "calibrated"}
SMALL = ("--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "64")
EXACT, EAGER, TWO_RANKS = ("--dtype", "float32"), ("--enforce-eager",), ("--tensor-parallel-size", "2")
UNSUMMED = ("--worker-extension-cls", "unsummed.Unsummed")
CACHE = ("--block-size", "32", "--num-gpu-blocks-override", "12")  # less than the requests want at once
SETS = (None, ["amber", "cyan"], ["blue", "cyan", "dun"], ["ecru"])
SPLIT = [tokens(8, seed=8), tokens(20, seed=20)]  # ranks that do not sum their scores find other experts
PROMPTS = [tokens(12, seed=1), tokens(150, seed=5), tokens(40, seed=3), tokens(90, seed=8), *SPLIT]
TIE = 0.06  # of evidence; bfloat16 moves it by up to 0.026 in transformers
NEW = 8
CHAT = [
    {"role": "user", "content": "w40 w41 w42 w43 is red w90"},
    {"role": "assistant", "content": "w50 w51"},
    {"role": "user", "content": "w60 w61 w62 the sky w63 w64 w65"},
]


@pytest.fixture(scope="module")
def calibrated(served, tmp_path_factory):
    """The model with a tokenizer, and its experts calibrated on texts that it wrote."""
    root = tmp_path_factory.mktemp("calibrated")
    (root / "model").symlink_to(served / "model")
    save_tokenizer(root / "model")
    store = LibraryStore(root / "library")
    for expert in sorted((served / "library").iterdir()):
        store.add(expert.name, expert)
    model = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    library = spectr.ExpertLibrary.open(root / "library")
    spectr.calibrate(model, library, tokenizer_of(root), samples=6, tokens=24).save(root / "library")
    return root


def tokenizer_of(world):
    return AutoTokenizer.from_pretrained(world / "model")


def in_transformers(world, experts):
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    return spectr.compose(model, world / "library", spectr.Calibrated()).allow(experts)


def by_transformers(world, prompt, experts):
    """Its greedy answer, and the expert that it holds, in a model that has these experts alone."""
    routed = in_transformers(world, experts)
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    made = routed.model.generate(ids, attention_mask=ids > -1, **options)
    [place] = routed.prompt.weights_BE[0].nonzero()[:, 0].tolist()
    return tokenizer_of(world).decode(made[0, len(prompt) :], skip_special_tokens=True), routed.experts[place]


async def asked(client, path="/v1/completions", **body):
    """An answer's text, and the expert that all of its tokens have."""
    exact = {"model": "spectr", "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_routing": True}
    answer = await client.post(path, json={**exact, **body})
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    names, told = choice["routing"]["experts"], choice["routing"]["tokens"]
    assert len(told) == NEW
    assert all(token == told[0] for token in told)
    [[number, share]] = told[0]
    assert share == 1
    text = choice.get("text") or choice["message"]["content"]
    return text.strip(), names[number]


@asynccontextmanager
async def serving(world, *options):
    """A client of a server of these experts, and its engine."""
    settings = Settings(library=str(world / "library"), router=ROUTER)
    started = launched(str(world / "model"), settings, base_model="tiny", options=(*SMALL, *options))
    async with started as (app, engine):
        transport = httpx.ASGITransport(app=Gateway(app, engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=300) as client:
            yield client, engine


async def all_asked(client, requests):
    """At once; each is a prompt and its set."""
    bodies = [{"prompt": ids} | ({"experts": names} if names else {}) for ids, names in requests]
    return await asyncio.gather(*(asked(client, **body) for body in bodies))


@pytest.mark.parametrize("options", [EAGER, (), EAGER + TWO_RANKS], ids=["eager", "compiled", "two ranks"])
def test_prompts_are_decided_on_as_in_transformers_alone_and_in_a_batch(calibrated, options, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    requests = [(prompt, experts) for prompt in PROMPTS for experts in SETS]
    expected = [by_transformers(calibrated, *request) for request in requests]
    assert len({expert for _, expert in expected}) > 2  # they do not all find the same one

    async def story():
        async with serving(calibrated, *EXACT, *CACHE, *options) as (client, engine):
            for _ in range(2):  # the second time there are cached prefixes, of all sets
                assert await all_asked(client, requests) == expected
            await turns(client)
            await removed(client, engine)

    async def turns(client):
        ids = tokenizer_of(calibrated).apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        told = await asked(client, "/v1/chat/completions", messages=CHAT)
        assert told == by_transformers(calibrated, ids, None)

    async def removed(client, engine):
        _, first = await asked(client, prompt=PROMPTS[0])
        await engine.discard(first)
        left = [name for name in ("amber", "blue", "cyan", "dun", "ecru") if name != first]
        assert await asked(client, prompt=PROMPTS[0]) == by_transformers(calibrated, PROMPTS[0], left)

    asyncio.run(story())


def test_without_the_sum_over_ranks_other_experts_are_found(calibrated):
    """The negative control; a probe's tokens are computed by the base model, so that nothing but scores can differ."""

    async def story():
        async with serving(calibrated, *EXACT, *EAGER, *TWO_RANKS, *UNSUMMED) as (client, _):
            return await all_asked(client, [(prompt, None) for prompt in SPLIT])

    for prompt, (_, found) in zip(SPLIT, asyncio.run(story()), strict=True):
        assert found != by_transformers(calibrated, prompt, None)[1]


def test_bfloat16_finds_the_experts_of_float32_where_that_is_no_near_tie(calibrated, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    expected = [(ids, names, clear) for ids in PROMPTS for names in SETS if (clear := clearly(calibrated, ids, names))]
    assert len(expected) > 12
    assert len({expert for _, _, expert in expected}) > 2

    async def story():
        async with serving(calibrated, "--dtype", "bfloat16") as (client, _):
            return await all_asked(client, [(ids, names) for ids, names, _ in expected])

    assert [found for _, found in asyncio.run(story())] == [expert for _, _, expert in expected]


def clearly(world, prompt, experts):
    """The expert that float32 finds by more than a near tie, if there is one."""
    routed = in_transformers(world, experts)
    [evidence_E] = routed.prompt.evidence(torch.tensor([prompt]))
    best, *others = evidence_E.sort(descending=True).values.tolist()
    return routed.experts[int(evidence_E.argmax())] if not others or best - others[0] > TIE else None


def test_without_somebody_who_decides_such_a_router_is_refused(calibrated):
    from spectr.vllm.config import SpectrConfig

    config = Settings(library=str(calibrated / "library"), router=ROUTER).as_config()
    with pytest.raises(CompositionError, match="nobody decides on prompts here: calibrated"):
        SpectrConfig.from_config(config)
