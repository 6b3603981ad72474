"""Verdicts of more than one expert inside vLLM, held weights and priors, and several routers in one engine."""

import asyncio
import shutil

import pytest
import torch
from deciding import (
    CACHE,
    EAGER,
    EXACT,
    PROMPTS,
    SETS,
    TWO_RANKS,
    answered,
    decided,
    get_router,
    in_transformers,
    make_calibrated,
    serving,
)
from engine import NAMES, TOLERANCE, composed, engine, judged, tokens
from test_bfloat16 import distance

from models import random_factors, write_adapter
from spectr import ExpertLibrary
from spectr.vllm.requests import ROUTER, VERDICT

HELD = {"name": "calibrated", "top_k": 3, "weights": "softmax", "temperature": 0.1}
PRIOR = {"name": "calibrated-prior", "top_k": 2}
ALL = [{"name": name, "top_k": 2} for name in ("spectr", "arrow", "calibrated-token")] + [
    {"name": "uniform"},
    HELD,
    PRIOR,
]
KINDS = {
    "held": ([HELD], ()),
    "prior": ([PRIOR], ()),
    "prior, with another": ([{"name": "calibrated-token", "top_k": 2}, PRIOR], EAGER),
    "held and prior, two ranks": ([HELD, PRIOR], EAGER + TWO_RANKS),
    "all": (ALL, ()),
    "all, two ranks": ([ALL[2], ALL[1], PRIOR, HELD, ALL[0]], EAGER + TWO_RANKS),
}
VERDICTS = (
    {"amber": 0.5, "blue": 0.3, "cyan": 0.2},
    {"amber": 0.2, "blue": 0.3, "cyan": 0.5},
    {"dun": 0.9, "blue": 0.1},
)


@pytest.fixture(scope="module")
def uneven(served, tmp_path_factory):
    """The same model, calibrated, with two experts that do not adapt all of its modules."""
    root = tmp_path_factory.mktemp("uneven")
    shutil.copytree(served / "library", root / "library")
    lacking = {"amber": ("down_proj", "v_proj"), "blue": ("gate_proj", "up_proj", "o_proj")}
    for seed, (name, left_out) in enumerate(lacking.items()):
        shapes = ExpertLibrary.open(served / "library")[name].shapes
        kept = {module: shape for module, shape in shapes.items() if not module.endswith(left_out)}
        factors = {
            module: random_factors(4, shape.inputs, shape.outputs, 500 * seed + number)
            for number, (module, shape) in enumerate(kept.items())
        }
        shutil.rmtree(root / "library" / name)
        write_adapter(root / "library" / name, {m: (A, 0.5 * B) for m, (A, B) in factors.items()}, alpha=8)
    (root / "model").symlink_to(served / "model")
    return make_calibrated(root, tmp_path_factory.mktemp("uneven-calibrated"))


_known = {}


def known(*request):
    """What transformers says, which is asked once."""
    key = repr(request)
    if key not in _known:
        _known[key] = decided(*request)
    return _known[key]


async def check(client, expected):
    """All requests at once, each answered as it is expected."""

    async def one(router, prompt, experts):
        body = {"prompt": prompt, "router": router} | ({"experts": list(experts)} if experts else {})
        text, routing = await answered(client, **body)
        names = routing["experts"]
        return text, [{names[number]: share for number, share in token} for token in routing["tokens"]]

    found = await asyncio.gather(*(one(*request) for request in expected))
    for (text, shares), (wanted, those) in zip(found, expected.values(), strict=True):
        assert text == wanted
        for token, other in zip(shares, those, strict=True):
            sent = dict.fromkeys(other, 0.0) | token  # shares below 0.001 are not sent
            assert sent == pytest.approx(other, abs=1.1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_decisions_are_those_of_transformers_with_each_router_and_set_alone(
    uneven, kind, monkeypatch, tmp_path
):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    routers, options = KINDS[kind]
    requests = [(router, prompt, experts) for router in routers for prompt in PROMPTS[:3] for experts in SETS]

    def judge(requests):
        return {(r["name"], (*p,), e and (*e,)): known(uneven, r, p, e) for r, p, e in requests}

    expected = judge(requests)
    several = [token for _, shares in expected.values() for token in shares if sum(s > 0 for s in token.values()) > 1]
    assert len(several) > len(expected)
    texts = [{expected[router["name"], (*prompt,), None][0] for router in routers} for prompt in PROMPTS[:3]]
    assert [len(one) for one in texts] == [len(routers)] * 3  # each router has another answer
    without = judge([(router, PROMPTS[0], NAMES[1:]) for router in routers])

    async def story():
        told = {"router": routers[0], "other_routers": routers[1:]}
        async with serving(uneven, *EXACT, *CACHE, *options, **told) as (client, engine):
            for _ in range(2):  # the second time there are cached prefixes, of all sets, verdicts and routers
                await check(client, expected)
            await engine.discard("amber")
            await check(client, {(name, prompt, None): told for (name, prompt, _), told in without.items()})

    asyncio.run(story())


def holding(world, verdict, router=HELD):
    """The model in transformers, which holds these weights."""
    routed = in_transformers(world, None, get_router(router))
    routed.prompt.hold(torch.tensor([[verdict.get(name, 0.0) for name in routed.experts]]))
    return routed.model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cached_prefix_is_of_one_verdict_alone_and_a_removed_expert_leaves_the_others_their_weights(
    uneven, dtype, monkeypatch, tmp_path
):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    prompt = tokens(70, seed=1)
    judge, near = (judged, TOLERANCE) if dtype == "float32" else (distance, 0.2)
    routers = {"router": {"name": "spectr", "top_k": 1}, "other_routers": [HELD, PRIOR]}
    with engine(uneven, **routers, dtype=dtype, eager=False, block_size=32) as running:

        def answer(verdict, prompt_logs=False, **extra):
            [told] = running.answers(
                [(prompt, None)], prompt=prompt_logs, **{ROUTER: "calibrated", VERDICT: verdict, **extra}
            )
            return told

        for verdict in VERDICTS:
            assert judge(holding(uneven, verdict), prompt, answer(verdict, prompt_logs=True)) < near
        hits = running.counter("vllm:prefix_cache_hits")
        again = [answer(verdict) for verdict in VERDICTS]
        assert running.counter("vllm:prefix_cache_hits") > hits
        for verdict, told in zip(VERDICTS, again, strict=True):
            if dtype == "float32":
                assert judged(holding(uneven, verdict), prompt, told) < TOLERANCE
        wrong = [{**VERDICTS[0], "dun": 0.1}, {"amber": -1.0}, {"amber": float("nan")}, {"nobody": 1.0}, ["amber"]]
        for verdict in wrong:  # more than the router would hold, and what is no verdict
            assert judge(composed(uneven, []), prompt, answer(verdict, prompt_logs=True)) < near
        assert judge(composed(uneven, []), prompt, answer(VERDICTS[0], prompt_logs=True, **{ROUTER: "spectr"})) < near
        running.llm.collective_rpc("spectr_remove", args=("blue",))
        left = {name: weight for name, weight in VERDICTS[0].items() if name != "blue"}
        assert judge(holding(uneven, left), prompt, answer(VERDICTS[0], prompt_logs=True)) < near
