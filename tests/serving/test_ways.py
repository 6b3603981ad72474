"""What is where on a server: its root, HEAD, what is counted as what, and which keys may do nothing."""

import asyncio
import json

import httpx
import pytest

from serving import ADMIN, ALL, BASE, CATS, NONE, POLICY, StandIn
from spectr.serving.engines.engine import Step
from spectr.serving.gateway import Gateway

CHAT = {"model": "spectr", "messages": [{"role": "user", "content": "what is it"}]}
PAGE = "/playground/"


async def healthy(scope, receive, send):
    """An application that is well, and is never asked with HEAD."""
    assert scope["method"] == "GET"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b'{"status": "ok"}'})


@pytest.fixture
def gateway():
    return Gateway(healthy, StandIn(), max_body=100)


def ask(gateway, method, path, key=None, **given):
    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://here") as client:
            return await client.request(
                method, path, headers={"authorization": f"Bearer {key}"} if key else {}, **given
            )

    return asyncio.run(go())


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/spectr", "/playground", PAGE])
def test_head_is_get_without_its_body(gateway, path):
    whole, head = (ask(gateway, method, path) for method in ("GET", "HEAD"))
    assert head.status_code == whole.status_code
    assert head.content == b""
    named = {"content-type", "location", "cache-control", *({"content-length"} if path != "/metrics" else ())}
    assert all(head.headers.get(name) == whole.headers.get(name) for name in named)


def test_the_root_leads_to_the_page_where_there_is_one(gateway):
    answer = ask(gateway, "GET", "/")
    assert (answer.status_code, answer.headers["location"]) == (307, "playground/")
    assert answer.json() == {"models": "/v1/models", "health": "/health", "page": PAGE}
    gateway.page = None
    answer = ask(gateway, "GET", "/")
    assert (answer.status_code, answer.json()) == (200, {"models": "/v1/models", "health": "/health"})
    assert "location" not in answer.headers


def test_what_is_not_possible_says_what_is(gateway):
    error = ask(gateway, "PUT", "/v1/models").json()["error"]
    assert error["message"] == "/v1/models does not support PUT\n  expected: GET or HEAD"
    assert "/v1/chat/completions" in ask(gateway, "GET", "/v1/chat").json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "endpoint"),
    [
        ("DELETE", "/v1/experts/cats", "/v1/experts"),
        ("GET", "/v1/models/spectr/cats", "/v1/models"),
        ("GET", "/playground/app.js", "/playground"),
        ("GET", "/", "/"),
        ("GET", "/v1/expertsandmore", "other"),
    ],
)
def test_each_endpoint_is_counted_under_its_own_name(gateway, method, path, endpoint):
    status = ask(gateway, method, path).status_code
    assert f'spectr_requests_total{{endpoint="{endpoint}",status="{status}"}} 1.0' in gateway.metrics.text().decode()


def test_a_body_that_is_too_long_is_refused_with_the_remedy(gateway):
    error = ask(gateway, "POST", "/v1/completions", content=b" " * 101).json()["error"]
    assert error["message"].splitlines() == [
        "the body has 101 bytes",
        "  expected: at most 100 bytes",
        "  to do: omit earlier turns, or split it into several requests",
    ]


@pytest.mark.parametrize(
    ("key", "model", "told"),
    [
        (NONE, "spectr", "use another key: in the policy, this one has no served 'experts' and no 'base: true'"),
        (NONE, "tiny", "use another key: in the policy, this one has no served 'experts' and no 'base: true'"),
        (BASE, "spectr", "use 'tiny'; only keys with 'experts' in the policy may use the composed model"),
        (CATS, "spectre", "use 'spectr' if you mean that; /v1/models lists what this key may use"),
        (CATS, "cats", "use 'spectr/cats' if you mean that; /v1/models lists what this key may use"),
        (CATS, "ants", "/v1/models lists what this key may use"),
        (CATS, "gpt", "/v1/models lists what this key may use"),
    ],
)
def test_a_forbidden_model_is_refused_with_reason_and_remedy(key, model, told):
    answer = ask(
        Gateway(healthy, StandIn(), policy=POLICY), "POST", "/v1/chat/completions", key, json={**CHAT, "model": model}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert f"to do: {told}" in answer.json()["error"]["message"]


def test_a_key_that_is_no_administrators_is_refused_with_the_reason():
    gateway = Gateway(healthy, StandIn(), policy=POLICY)
    error = ask(gateway, "DELETE", "/v1/experts/cats", ALL).json()["error"]
    assert "'admin: true' in the policy" in error["message"]
    error = ask(gateway, "DELETE", "/v1/experts/cat", ADMIN).json()["error"]
    assert "use 'cats' if you mean that" in error["message"]


def test_an_expert_with_nan_keeps_the_list_json(gateway):
    gateway.engine.outlier_scores = {"bees": float("inf")}
    text = ask(gateway, "GET", "/v1/models/spectr/bees").text
    assert json.loads(text, parse_constant=pytest.fail)["outlier_score"] == "not finite"


def test_the_work_of_an_expert_that_is_removed_stays_counted(gateway):
    gateway.metrics.count_steps(["bees"], [Step({"bees": 0.75})])
    gateway.metrics.forget("bees")
    text = gateway.metrics.text().decode()
    assert 'spectr_tokens_total{expert="bees"} 0.75' in text
    assert 'spectr_expert_outlier_score{expert="bees"}' not in text
