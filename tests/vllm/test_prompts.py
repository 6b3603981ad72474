"""A router that decides once for a whole prompt, inside vLLM: as in transformers, for each set as if it were alone."""

import asyncio

import pytest
import torch
from deciding import (
    CACHE,
    EAGER,
    EXACT,
    PROMPTS,
    SETS,
    SPLIT,
    TWO_RANKS,
    all_asked,
    asked,
    by_transformers,
    in_transformers,
    serving,
    tokenizer_of,
)

from spectr.composed_model import Settings
from spectr.errors import CompositionError

UNSUMMED = ("--worker-extension-cls", "unsummed.Unsummed")
TIE = 0.06  # of evidence; bfloat16 moves it by up to 0.026 in transformers
CHAT = [
    {"role": "user", "content": "w40 w41 w42 w43 is red w90"},
    {"role": "assistant", "content": "w50 w51"},
    {"role": "user", "content": "w60 w61 w62 the sky w63 w64 w65"},
]


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
    from spectr.vllm.quantization import SpectrConfig

    config = Settings(library=str(calibrated / "library"), router={"name": "calibrated"}).as_config()
    with pytest.raises(CompositionError, match="vLLM by itself cannot decide on prompts: calibrated"):
        SpectrConfig.from_config(config)
