"""vLLM behind the gateway, as a client of the API sees it."""

import asyncio
import json

import httpx
import pytest
from command import save_tokenizer
from engine import ROUTER

from spectr.composed_model import Settings
from spectr.serving.engines import Engine
from spectr.serving.engines.vllm import launched
from spectr.serving.gateway import Gateway

SMALL = ("--max-model-len", "256", "--max-num-seqs", "8", "--dtype", "float32", "--enforce-eager")
PROMPT = {"model": "spectr", "prompt": list(range(5, 25)), "max_tokens": 4, "temperature": 0, "ignore_eos": True}


async def said(client, path="/v1/completions", **body):
    answer = await client.post(path, json={**PROMPT, **body})
    return answer.status_code, answer.json()


async def chunks(client, **body):
    async with client.stream("POST", "/v1/completions", json={**PROMPT, **body, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def streamed(client, **body):
    return [choice for chunk in await chunks(client, **body) for choice in chunk["choices"]]


@pytest.fixture(scope="module")
def model(served):
    """The model with a tokenizer, which the server wants though the tests speak in ids."""
    save_tokenizer(served / "model")
    return served


def test_the_api(model):
    async def story():
        settings = Settings(library=str(model / "library"), router=ROUTER)
        async with launched(str(model / "model"), settings, base_model="tiny", options=SMALL) as (app, engine):
            assert isinstance(engine, Engine)
            assert len(engine.layers) == 14
            transport = httpx.ASGITransport(app=Gateway(app, engine))
            async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=120) as client:
                await tell(client, engine)

    asyncio.run(story())


async def tell(client, engine):
    status, whole = await said(client, return_routing=True, experts=["cyan", "amber"])
    assert status == 200
    [choice] = whole["choices"]
    assert choice["routing"] == {"experts": ["amber", "cyan"], "tokens": [[[0, 0.5], [1, 0.5]]] * 4}
    assert "token_ids" not in choice or choice["token_ids"] is None

    pieces = await streamed(client, return_routing="layers", experts=["cyan", "amber"])
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    assert [token for piece in pieces for token in piece["routing"]["tokens"]] == choice["routing"]["tokens"]
    by_layer = [token for piece in pieces for token in piece["routing"]["by_layer"]]
    assert [len(token) for token in by_layer] == [14] * 4
    assert all({expert for expert, _, _ in layer} == {0, 1} for token in by_layer for layer in token)

    assert all("usage" not in chunk for chunk in await chunks(client))
    *before, last = await chunks(client, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in before)

    _, several = await said(client, prompt=[PROMPT["prompt"], list(range(40, 60))], n=1, return_routing=True)
    assert [len(one["routing"]["tokens"]) for one in several["choices"]] == [4, 4]
    _, sampled = await said(client, n=3, temperature=1.0, seed=1, return_routing=True)
    assert [len(one["routing"]["tokens"]) for one in sampled["choices"]] == [4, 4, 4]

    _, alone = await said(client, model="spectr/amber")
    _, base = await said(client, model="tiny")
    _, smuggled = await said(client, model="tiny", vllm_xargs={"spectr_experts": ["amber"]}, cache_salt="x")
    assert smuggled["choices"][0]["text"] == base["choices"][0]["text"] != alone["choices"][0]["text"]

    status, refused = await said(client, use_beam_search=True, n=2)
    assert (status, refused["error"]["param"]) == (400, "use_beam_search")
    status, refused = await said(client, min_token=2)
    assert (status, refused["error"]["param"]) == (400, "min_token")
    assert "use 'min_tokens' if you mean that" in refused["error"]["message"]
    await engine.discard("amber")
    status, gone = await said(client, model="spectr/amber")
    assert (status, gone["error"]["code"]) == (404, "model_not_found")
    assert engine.experts == ("blue", "cyan", "dun", "ecru")
    assert b"vllm:" in engine.metrics()
