"""One server that routes token by token and by decisions for prompts: each answer as by a server of its own router."""

import asyncio

import httpx
import pytest
from command import server
from deciding import (
    CACHE,
    EAGER,
    EXACT,
    PROMPTS,
    SETS,
    TWO_RANKS,
    answered,
    asked,
    by_transformers,
    in_transformers,
    serving,
    text_of,
)

import spectr
from spectr.composed_model import Settings

NAMES = ["amber", "blue", "cyan", "dun", "ecru"]
KINDS = {
    "the same factors": ("calibrated-token", ()),
    "other factors": ("spectr", EAGER + TWO_RANKS),
    "prototypes": ("arrow", EAGER),
}


async def both(client, token, expected):
    """All requests at once, each as it is expected."""

    async def one(prompt, experts, router):
        body = {"prompt": prompt, "router": router} | ({"experts": list(experts)} if experts else {})
        if router == "calibrated":
            return await asked(client, **body)
        text, routing = await answered(client, **body)
        assert any(len(token) > 1 for token in routing["tokens"]) == (len(routing["experts"]) > 1)
        return text

    order = [(prompt, experts, router) for prompt, experts in expected for router in (token, "calibrated")]
    found = await asyncio.gather(*(one(*request) for request in order))
    assert found == [expected[prompt, experts][router] for prompt, experts, router in order]


def judge(world, name, prompt, experts):
    """What servers that have one router say of it."""
    among = None if experts is None else list(experts)
    routed = in_transformers(world, among, spectr.get_router(name, top_k=2))
    return {name: text_of(world, routed, prompt), "calibrated": by_transformers(world, prompt, among)}


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_is_answered_as_by_a_server_of_its_router_and_set_alone(calibrated, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    name, options = KINDS[kind]
    requests = [((*prompt,), experts and (*experts,)) for prompt in PROMPTS[:4] for experts in SETS]
    expected = {(prompt, experts): judge(calibrated, name, prompt, experts) for prompt, experts in requests}
    assert len({told["calibrated"][1] for told in expected.values()}) > 2
    assert sum(told[name] != told["calibrated"][0] for told in expected.values()) > len(expected) / 2
    [(first, _), *_] = expected
    without = {(first, None): judge(calibrated, name, first, NAMES[1:])}

    async def story():
        routers = {"router": {"name": name, "top_k": 2}, "other_routers": [{"name": "calibrated"}]}
        async with serving(calibrated, *EXACT, *CACHE, *options, **routers) as (client, engine):
            assert engine.routers == (name, "calibrated")
            for _ in range(2):  # the second time there are cached prefixes, of all sets and both routers
                await both(client, name, expected)
            assert (await answered(client, prompt=first))[0] == expected[first, None][name]  # the default
            await engine.discard("amber")
            await both(client, name, without)

    asyncio.run(story())


def test_in_bfloat16_a_decision_is_that_of_a_server_with_it_alone(calibrated, monkeypatch, tmp_path):
    """The layers' own factors are other ones there; one request at a time, so that batches are the same."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))

    async def found(**routers):
        async with serving(calibrated, "--dtype", "bfloat16", *EAGER, **routers) as (client, _):
            given = {"router": "calibrated"}
            return [(await asked(client, prompt=prompt, **given))[1] for prompt in PROMPTS]

    shared = asyncio.run(found(router={"name": "spectr", "top_k": 2}, other_routers=[{"name": "calibrated"}]))
    assert shared == asyncio.run(found(router={"name": "calibrated"}))
    assert len(set(shared)) > 1


def test_where_nobody_decides_the_token_router_serves_and_what_is_undecided_gets_the_base_model(calibrated):
    from engine import TOLERANCE, composed, engine, judged, tokens

    from spectr.vllm.requests import ROUTER

    prompt, token = tokens(70, seed=1), {"name": "calibrated-token", "top_k": 2}
    with engine(calibrated, router=token, other_routers=[{"name": "calibrated"}], block_size=32) as running:
        [plain] = running.answers([(prompt, ["amber", "cyan"])], prompt=False)
        undecided = running.answers(
            [(prompt, ["amber", "cyan"]), (prompt, None)], prompt=False, **{ROUTER: "calibrated"}
        )
        [alone] = running.answers([(prompt, ["amber"])], prompt=False, **{ROUTER: "calibrated"})
        [odd] = running.answers([(prompt, ["amber", "blue"])], prompt=False, **{ROUTER: "arrow"})
    assert judged(composed(calibrated, ["amber", "cyan"], token), prompt, plain) < TOLERANCE
    assert judged(composed(calibrated, ["amber"], token), prompt, alone) < TOLERANCE
    for answer in (*undecided, odd):
        assert judged(composed(calibrated, []), prompt, answer) < TOLERANCE


def test_the_command_takes_both_and_the_first_is_the_default(calibrated):
    with server(calibrated, "-r", "calibrated", "-r", "calibrated-token", "--dtype", "float32") as (address, said, _):
        assert "by calibrated (by request: calibrated-token)" in said
        with httpx.Client(base_url=address or said, timeout=60) as client:
            listed = client.get("/v1/models").json()["data"]
            assert listed[0]["routers"] == ["calibrated", "calibrated-token"]
            body = {"model": "spectr", "prompt": PROMPTS[0], "max_tokens": 1, "return_routing": True}
            for router, experts in ((None, 1), ("calibrated", 1), ("calibrated-token", 2)):
                answer = client.post("/v1/completions", json=body | ({"router": router} if router else {})).json()
                [token] = answer["choices"][0]["routing"]["tokens"]
                assert min(len(token), 2) == experts
            refused = client.post("/v1/completions", json=body | {"router": "spectr"}).json()["error"]
            assert (refused["code"], refused["param"]) == ("router_not_served", "router")


def test_its_config_is_taken_by_vllm_alone(calibrated):
    from spectr.vllm.quantization import SpectrConfig

    routers = {"router": {"name": "spectr"}, "other_routers": [{"name": "calibrated"}]}
    config = Settings(library=str(calibrated / "library"), **routers).as_config()
    assert SpectrConfig.from_config(config).settings.other_routers == [{"name": "calibrated"}]
