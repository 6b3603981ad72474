"""The gateway alone, around a stand-in for an engine: who may ask, and for what."""

import json

import pytest

from inner import CHAT, chat, error_of
from serving import ALL, BASE, CATS, NONE, POLICY
from spectr.errors import SpectrError
from spectr.serving.gateway import Gateway


def test_without_a_policy_everything_is_open(ask, engine):
    assert chat(ask).status_code == 200
    assert engine.tickets[0].experts == ("ants", "bees", "cats")
    listed = [model["id"] for model in ask("GET", "/v1/models").json()["data"]]
    assert listed == ["spectr", "spectr/ants", "spectr/bees", "spectr/cats", "tiny"]


@pytest.mark.parametrize("key", [None, "sk-wrong", CATS + "x", CATS[:-1], "\u00e9"[:0] or " "])
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")]
)
def test_with_a_policy_a_key_is_needed(ask, inner, key, method, path):
    answer = ask(method, path, key, POLICY, **({"json": CHAT} if method == "POST" else {}))
    error_of(answer, 401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert not inner.asked


@pytest.mark.parametrize(
    ("key", "models"),
    [
        (ALL, ["spectr", "spectr/ants", "spectr/bees", "spectr/cats", "tiny"]),
        (CATS, ["spectr", "spectr/cats"]),
        (NONE, []),
        (BASE, ["tiny"]),
    ],
)
def test_a_key_sees_what_it_may_use(ask, key, models):
    assert [model["id"] for model in ask("GET", "/v1/models", key, POLICY).json()["data"]] == models
    for name in ("spectr", "spectr/ants", "spectr/cats", "tiny", "spectr/"):
        answer = ask("GET", f"/v1/models/{name}", key, POLICY)
        assert answer.status_code == (200 if name in models else 404)


@pytest.mark.parametrize(
    ("key", "asked", "granted"),
    [
        (ALL, {}, ("ants", "bees", "cats")),
        (ALL, {"experts": ["cats", "ants", "cats"]}, ("ants", "cats")),
        (ALL, {"model": "spectr/bees"}, ("bees",)),
        (ALL, {"model": "spectr/bees", "experts": ["bees"]}, ("bees",)),
        (ALL, {"model": "tiny"}, ()),
        (CATS, {}, ("cats",)),
        (CATS, {"experts": ["cats"]}, ("cats",)),
        (BASE, {"model": "tiny"}, ()),
    ],
)
def test_a_request_narrows_its_keys_set(ask, engine, key, asked, granted):
    assert chat(ask, key, POLICY, **asked).status_code == 200
    assert engine.tickets[-1].experts == granted


@pytest.mark.parametrize("name", ["ants", "nobody", "../cats", "Cats", "cats "])
def test_an_expert_that_is_not_there_and_one_that_is_not_yours_are_the_same(ask, engine, name):
    answer = chat(ask, CATS, POLICY, experts=["cats", name])
    told = error_of(answer, 404, "expert_not_found", "experts")
    assert told.startswith(f"there is no expert '{name}'\n  to do: ")
    assert told.endswith("/v1/models lists what this key may use")
    answer = chat(ask, CATS, POLICY, model=f"spectr/{name}")
    told = error_of(answer, 404, "model_not_found", "model")
    assert told.startswith(f"there is no model 'spectr/{name}'\n  to do: ")
    assert "'spectr'" not in told  # which is all of the key's experts
    assert not engine.tickets


@pytest.mark.parametrize(
    ("key", "asked", "status", "code", "param"),
    [
        (ALL, {"experts": []}, 400, "invalid_value", "experts"),
        (ALL, {"experts": "cats"}, 400, "invalid_value", "experts"),
        (ALL, {"experts": [1]}, 400, "invalid_value", "experts"),
        (ALL, {"router": "arrow"}, 400, "router_not_served", "router"),
        (ALL, {"max_tokns": 5}, 400, "invalid_value", "max_tokns"),
        (ALL, {"metadat": 5}, 400, "invalid_value", "metadat"),
        (ALL, {"extra_body": {"experts": ["cats"]}}, 400, "invalid_value", "extra_body"),
        (ALL, {"router": 3}, 400, "invalid_value", "router"),
        (ALL, {"return_routing": "all"}, 400, "invalid_value", "return_routing"),
        (ALL, {"return_routing": 1}, 400, "invalid_value", "return_routing"),
        (ALL, {"model": "gpt"}, 404, "model_not_found", "model"),
        (ALL, {"model": None}, 400, "invalid_value", "model"),
        (ALL, {"messages": []}, 400, "invalid_value", "messages"),
        (ALL, {"messages": "hello"}, 400, "invalid_value", "messages"),
        (ALL, {"messages": [{"content": "x"}]}, 400, "invalid_value", "messages"),
        (ALL, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "invalid_value", "messages"),
        (ALL, {"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        (ALL, {"max_tokens": "5"}, 400, "invalid_value", "max_tokens"),
        (ALL, {"temperature": 3}, 400, "invalid_value", "temperature"),
        (ALL, {"stream": "yes"}, 400, "invalid_value", "stream"),
        (ALL, {"model": "tiny", "experts": ["cats"]}, 400, "experts_conflict", "experts"),
        (ALL, {"model": "spectr/ants", "experts": ["cats"]}, 400, "experts_conflict", "experts"),
        (CATS, {"model": "tiny"}, 404, "model_not_found", "model"),
        (NONE, {}, 404, "model_not_found", "model"),
        (BASE, {}, 404, "model_not_found", "model"),
    ],
)
def test_wrong_requests_are_refused_with_the_reason_and_reach_no_engine(
    ask, inner, engine, key, asked, status, code, param
):
    error_of(chat(ask, key, POLICY, **asked), status, code, param)
    assert not inner.asked
    assert not engine.tickets


def test_a_router_that_is_not_served_is_refused_with_those_that_are(ask):
    told = error_of(chat(ask, router="spektr"), 400, "router_not_served", "router")
    expected = "calibrated or spectr\n  to do: use 'spectr' if you mean that"
    assert told == f"router 'spektr' is not served\n  expected: {expected}"
    assert "to do" not in error_of(chat(ask, router="arrow"), 400, "router_not_served", "router")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b'{"model": "spectr"', b"[" * 3000])
def test_malformed_bodies(ask, body):
    error_of(ask("POST", "/v1/chat/completions", content=body), 400, "invalid_json")


def test_a_body_that_is_too_long(ask, engine):
    error_of(chat(ask, padding="x" * 6000), 413, "request_too_large")

    async def parts():
        for _ in range(100):
            yield b" " * 100

    error_of(ask("POST", "/v1/completions", content=parts()), 413, "request_too_large")
    assert not engine.tickets


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/responses", 404, "not_found"),
        ("POST", "/load_model", 404, "not_found"),
        ("POST", "/reset", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/openapi.json", 404, "not_found"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
        ("POST", "//v1/chat/completions", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/spectr", 405, "method_not_allowed"),
        ("POST", "/", 405, "method_not_allowed"),
        ("HEAD", "/v1/completions", 405, "method_not_allowed"),
        ("GET", "/playground/nothing.js", 404, "not_found"),
        ("GET", "/playground/..%2fgateway.py", 404, "not_found"),
    ],
)
def test_nothing_else_reaches_the_application(ask, inner, method, path, status, code):
    answer = ask(method, path, json={})
    if method != "HEAD":
        error_of(answer, status, code)
    assert answer.status_code == status
    assert not inner.asked


@pytest.mark.parametrize(
    ("path", "do"),
    [
        ("/chat/completions", "use /v1/chat/completions; a client's base URL ends in /v1"),
        ("/completions", "use /v1/completions; a client's base URL ends in /v1"),
        ("/v1/v1/models", "use /v1/models; a client's base URL ends in /v1"),
        ("/v1/responses", "/v1/models lists the models; /v1/chat/completions and /v1/completions answer"),
    ],
)
def test_an_unknown_path_is_refused_with_the_known_ones(ask, path, do):
    assert error_of(ask("POST", path, json={}), 404, "not_found") == f"{path} does not exist\n  to do: {do}"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/models/spectr", "GET, HEAD"),
        ("OPTIONS", "/health", "GET, HEAD"),
        ("HEAD", "/v1/chat/completions", "POST"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("PATCH", "/v1/experts/cats", "GET, DELETE, HEAD"),
    ],
)
def test_a_wrong_method_is_refused_with_the_right_ones(ask, method, path, allowed):
    answer = ask(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        expected = f"{path} does not support {method}\n  expected: {allowed.replace(', ', ' or ')}"
        assert error_of(answer, 405, "method_not_allowed") == expected


def test_the_application_gets_our_id_and_no_key_and_not_our_fields(ask, inner, engine):
    extras = {"experts": ["cats"], "router": "spectr", "return_routing": True, "max_tokens": 4, "metadata": {"a": "b"}}
    answer = ask("POST", "/v1/chat/completions", ALL, POLICY, content=json.dumps({**CHAT, **extras}).encode())
    assert answer.status_code == 200
    [(path, headers, body)] = inner.asked
    assert path == "/v1/chat/completions"
    assert json.loads(body) == {**CHAT, "model": "inside", "max_tokens": 4, "metadata": {"a": "b"}}
    assert headers[b"x-request-id"] == engine.tickets[0].id.encode()
    assert headers[b"content-length"] == str(len(body)).encode()
    assert b"authorization" not in headers
    assert engine.tickets[0].router == "spectr"
    assert engine.finished == engine.tickets


def test_salts_differ_exactly_where_sets_or_routers_do(ask, engine):
    for asked in ({}, {"experts": ["cats", "ants", "bees"]}, {"experts": ["cats"]}, {"model": "spectr/cats"}):
        chat(ask, ALL, POLICY, **asked)
    chat(ask, CATS, POLICY)
    chat(ask, ALL, POLICY, model="tiny")
    chat(ask, ALL, POLICY, router="spectr")
    salts = [ticket.salt for ticket in engine.tickets]
    assert salts[0] == salts[1]
    assert salts[2] == salts[3] == salts[4]
    assert len({salts[0], salts[2], salts[5], salts[6]}) == 4


def test_health_is_the_applications_and_needs_no_key(ask, inner):
    assert ask("GET", "/health", policy=POLICY).status_code == 200
    assert inner.asked[0][0] == "/health"


def test_the_composed_model_cannot_have_the_base_models_name(inner, engine):
    with pytest.raises(SpectrError, match="base model's own name"):
        Gateway(inner, engine, served_name="tiny")


def test_only_the_page_is_served_without_a_key(ask, tmp_path, monkeypatch):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<title>page</title>")
    (tmp_path / "page" / "app.js").write_text("export {}")
    (tmp_path / "secret").write_text("no")
    monkeypatch.setattr("spectr.serving.gateway.find_page", lambda: tmp_path / "page")
    assert ask("GET", "/playground", policy=POLICY).headers["location"] == "playground/"
    page = ask("GET", "/playground/", policy=POLICY)
    assert (page.text, page.headers["content-type"]) == ("<title>page</title>", "text/html; charset=utf-8")
    assert "javascript" in ask("GET", "/playground/app.js", policy=POLICY).headers["content-type"]
    for path in ("/playground/..%2fsecret", "/playground/%2e%2e/secret", "/playground//etc/passwd", "/playground/x"):
        error_of(ask("GET", path, policy=POLICY), 404, "not_found")


def test_an_engine_that_routes_no_layer_is_refused(inner, engine, monkeypatch):
    monkeypatch.setattr(engine, "layers", ())
    with pytest.raises(SpectrError, match="no layer of this model is routed"):
        Gateway(inner, engine)
