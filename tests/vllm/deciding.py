"""A running server of calibrated experts, and the same models in transformers as its judge."""

import asyncio
import shutil
from contextlib import asynccontextmanager

import httpx
import torch
from command import save_tokenizer
from engine import tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectr
from spectr.composed_model import Settings
from spectr.library import LibraryStore
from spectr.serving.engines.vllm import launched
from spectr.serving.gateway import Gateway

SMALL = ("--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "64")
EXACT, EAGER, TWO_RANKS = ("--dtype", "float32"), ("--enforce-eager",), ("--tensor-parallel-size", "2")
CACHE = ("--block-size", "32", "--num-gpu-blocks-override", "12")  # less than the requests want at once
SETS = (None, ["amber", "cyan"], ["blue", "cyan", "dun"], ["ecru"])
SPLIT = [tokens(8, seed=8), tokens(20, seed=20)]  # ranks that do not sum their scores find other experts
PROMPTS = [tokens(12, seed=1), tokens(150, seed=5), tokens(40, seed=3), tokens(90, seed=8), *SPLIT]
NEW = 8


def make_calibrated(served, root):
    """The model with a tokenizer, and its experts calibrated on texts that it wrote."""
    shutil.copytree(served / "model", root / "model")
    save_tokenizer(root / "model")
    store = LibraryStore(root / "library")
    for expert in sorted((served / "library").iterdir()):
        store.add(expert.name, expert)
    model = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    library = spectr.ExpertLibrary.open(root / "library")
    spectr.calibrate(model, library, tokenizer_of(root), samples=6, tokens=24, null=0).save(root / "library")
    return root


def tokenizer_of(world):
    return AutoTokenizer.from_pretrained(world / "model")


def in_transformers(world, experts, router=None):
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    return spectr.compose(model, world / "library", router or spectr.Calibrated()).allow(experts)


def text_of(world, routed, prompt):
    """Its greedy answer."""
    ids = torch.tensor([prompt])
    routed.model.generation_config.eos_token_id = None  # which is a token like any other, as for servers that ignore it
    made = routed.model.generate(ids, attention_mask=ids > -1, max_new_tokens=NEW, do_sample=False)
    return tokenizer_of(world).decode(made[0, len(prompt) :], skip_special_tokens=True)


def by_transformers(world, prompt, experts):
    """Its greedy answer, and the expert that it holds, in a model that has these experts alone."""
    routed = in_transformers(world, experts)
    text = text_of(world, routed, prompt)
    [place] = routed.prompt.weights_BE[0].nonzero()[:, 0].tolist()
    return text, routed.experts[place]


def decided(world, router, prompt, experts):
    """Its greedy answer by this router, and each of its tokens' shares, in a model that has these experts alone."""
    routed = in_transformers(world, experts, get_router(router))
    text, [ids] = text_of(world, routed, prompt), torch.tensor([prompt])[None]
    made = routed.model.generate(ids, attention_mask=ids > -1, max_new_tokens=NEW, do_sample=False)
    if routed.prompt is not None:
        routed.prompt.hold(routed.prompt.decide(input_ids=ids))
    with spectr.trace(routed.model) as seen, torch.no_grad():
        routed.model(made)
    shares_TE = seen.weights()[0, len(prompt) - 1 : -1]
    return text, [dict(zip(seen.experts, shares_E.tolist(), strict=True)) for shares_E in shares_TE]


def get_router(config):
    return spectr.get_router(config["name"], **{key: value for key, value in config.items() if key != "name"})


async def answered(client, path="/v1/completions", **body):
    """An answer's text, and its routing."""
    exact = {"model": "spectr", "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_routing": True}
    answer = await client.post(path, json={**exact, **body})
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    assert len(choice["routing"]["tokens"]) == NEW
    return (choice.get("text") or choice["message"]["content"]).strip(), choice["routing"]


async def asked(client, path="/v1/completions", **body):
    """An answer's text, and the expert that all of its tokens have."""
    text, routing = await answered(client, path, **body)
    names, told = routing["experts"], routing["tokens"]
    assert all(token == told[0] for token in told)
    [[number, share]] = told[0]
    assert share == 1
    return text, names[number]


@asynccontextmanager
async def serving(world, *options, **routers):
    """A client of a server of these experts, and its engine."""
    settings = Settings(library=str(world / "library"), **{"router": {"name": "calibrated"}, **routers})
    started = launched(str(world / "model"), settings, base_model="tiny", options=(*SMALL, *options))
    async with started as (app, engine):
        transport = httpx.ASGITransport(app=Gateway(app, engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=300) as client:
            yield client, engine


async def all_asked(client, requests):
    """At once; each is a prompt and its set."""
    bodies = [{"prompt": ids} | ({"experts": names} if names else {}) for ids, names in requests]
    return await asyncio.gather(*(asked(client, **body) for body in bodies))
