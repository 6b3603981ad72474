"""The gateway alone, around a stand-in for an engine."""

import asyncio
import json

import httpx
import pytest

from serving import ADMIN, ALL, BASE, CATS, NONE, POLICY, StandIn
from spectr.errors import SpectrError
from spectr.serving.gateway import Gateway

CHAT = {"model": "spectr", "messages": [{"role": "user", "content": "what is it"}]}
WHOLE = {
    "id": "x",
    "object": "chat.completion",
    "model": "inside",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}

UNKNOWN = b"{\"detail\": \"Unexpected fields in the request: {'b', 'a'}\"}"
TOO_LONG = b'{"error": {"message": "too long", "code": "context_length_exceeded", "param": "messages"}}'


async def _send(send, status, body, kind=b"application/json", more=()):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    for part in more:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": body})


class Inner:
    """An application that says what it is told to say, and remembers what it was asked."""

    def __init__(self):
        self.status, self.body, self.kind, self.more = 200, json.dumps(WHOLE).encode(), b"application/json", ()
        self.asked, self.raises, self.waits = [], None, False

    async def __call__(self, scope, receive, send):
        message = await receive() if scope["method"] == "POST" else {"body": b""}
        self.asked.append((scope["path"], dict(scope["headers"]), message["body"]))
        if self.waits:
            assert (await receive())["type"] == "http.disconnect"
            await asyncio.sleep(60)
        if self.raises:
            raise self.raises
        await _send(send, self.status, self.body, self.kind, self.more)


@pytest.fixture
def inner():
    return Inner()


@pytest.fixture
def engine():
    return StandIn()


@pytest.fixture
def ask(inner, engine):
    def call(method, path, key=None, policy=None, **given):
        gateway = Gateway(inner, engine, policy=policy, max_body=5000)
        call.gateway = gateway

        async def go():
            transport = httpx.ASGITransport(gateway)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                headers = {"authorization": f"Bearer {key}"} if key else {}
                return await client.request(method, path, headers=headers, **given)

        return asyncio.run(go())

    return call


def chat(ask, key=None, policy=None, **extras):
    return ask("POST", "/v1/chat/completions", key, policy, json={**CHAT, **extras})


def error_of(answer, status, code, param=None):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    return error["message"]


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
    assert told.startswith(f"there is no model 'spectr/{name}'\n  to do: if you mean 'spectr")
    assert not engine.tickets


@pytest.mark.parametrize(
    ("key", "asked", "status", "code", "param"),
    [
        (ALL, {"experts": []}, 400, "invalid_value", "experts"),
        (ALL, {"experts": "cats"}, 400, "invalid_value", "experts"),
        (ALL, {"experts": [1]}, 400, "invalid_value", "experts"),
        (ALL, {"router": "arrow"}, 400, "router_not_served", "router"),
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
def test_wrong_requests_are_told_what_is_wrong_and_go_nowhere(ask, inner, engine, key, asked, status, code, param):
    error_of(chat(ask, key, POLICY, **asked), status, code, param)
    assert not inner.asked
    assert not engine.tickets


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
        ("HEAD", "/v1/experts/cats", 405, "method_not_allowed"),
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


def test_routing_is_added_where_it_is_asked_for(ask):
    assert "routing" not in chat(ask).json()["choices"][0]
    answer = chat(ask, return_routing=True, experts=["bees", "cats"]).json()
    assert answer["choices"][0]["routing"] == {"experts": ["bees", "cats"], "tokens": [[[0, 0.666]]]}
    assert answer["model"] == "spectr"
    told = chat(ask, return_routing="layers", model="spectr/cats").json()["choices"][0]["routing"]
    assert told["layers"] == ["one", "two"]
    assert told["by_layer"] == [[[[0, 1.0, 2.5]], []]]


def test_streams_are_edited_event_by_event_however_they_are_cut(ask, inner):
    chunks = [
        {"object": "chat.completion.chunk", "model": "inside", "choices": [{"index": 0, "delta": {"content": text}}]}
        for text in ("h\u00e9", "llo")
    ]
    events = b"".join(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n" for chunk in chunks)
    inner.kind, inner.body = b"text/event-stream; charset=utf-8", b""
    told = []
    for size in (1, 7, 1000):
        inner.more = [events[at : at + size] for at in range(0, len(events), size)]
        told.append(chat(ask, stream=True, return_routing=True).text)
    assert told[0] == told[1] == told[2]
    first, second, end, rest = told[0].split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    assert json.loads(first[6:])["choices"][0]["delta"]["content"] == "h\u00e9"
    assert json.loads(second[6:])["choices"][0]["routing"]["tokens"] == [[[0, 0.666]]]
    assert json.loads(second[6:])["model"] == "spectr"


@pytest.mark.parametrize("own", [False, True])  # whether the engine's usage comes in a chunk of its own
def test_a_streams_usage_is_counted_always_and_told_to_who_asks(ask, inner, own):
    part, usage = {"model": "inside", "choices": [{"index": 0, "delta": {"content": "yes"}}]}, WHOLE["usage"]
    chunks = [part, part, {**part, "choices": [], "usage": usage}] if own else [part, {**part, "usage": usage}]
    inner.kind = b"text/event-stream"
    inner.body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    for options in ({}, {"stream_options": None}, {"stream_options": {"include_usage": False}}):
        told = [json.loads(event[6:]) for event in chat(ask, stream=True, **options).text.split("\n\n")[:-2]]
        assert told == [{**part, "model": "spectr"}] * 2
        assert "spectr_generated_tokens_total 1.0" in ask.gateway.metrics.text().decode()
    asked = chat(ask, stream=True, stream_options={"include_usage": True}, return_routing=True)
    *told, last = [json.loads(event[6:]) for event in asked.text.split("\n\n")[:-2]]
    assert [chunk["usage"] for chunk in told] == [None, None]
    assert [chunk["choices"][0]["routing"]["tokens"] for chunk in told] == [[[[0, 0.666]]]] * 2
    assert last == {"model": "spectr", "choices": [], "usage": usage}


def test_a_stream_ends_with_done_once(ask, inner):
    inner.kind, inner.body = b"text/event-stream", b": comment\n\ndata: [DONE]\n\ndata: {}\n\n"
    assert chat(ask, stream=True).text == ": comment\n\ndata: [DONE]\n\n"


def test_an_error_within_a_stream_is_a_standard_one_and_keeps_the_engines_words_to_itself(ask, inner):
    inner.kind, inner.body = b"text/event-stream", b'data: {"error": "a "quoted" secret"}\n\n'
    first = chat(ask, stream=True).text.split("\n\n")[0]
    assert json.loads(first[6:])["error"]["code"] == "engine_error"
    assert "secret" not in first


@pytest.mark.parametrize(
    ("status", "body", "expected", "code", "message"),
    [
        (422, b'{"detail": "No way"}', 400, "invalid_request", "No way"),
        (422, UNKNOWN, 400, "invalid_request", "'a', 'b': no field that this engine knows\n  to do: leave it out"),
        (400, b'{"detail": [{"loc": 1}]}', 400, "invalid_request", '[{"loc": 1}]'),
        (400, TOO_LONG, 400, "context_length_exceeded", "too long"),
        (503, b'{"error": "secret"}', 503, "engine_error", "the engine cannot take requests now"),
        (500, b"Internal secret", 500, "engine_error", "the engine failed on this request"),
    ],
)
def test_an_applications_errors_become_standard_ones(ask, inner, status, body, expected, code, message):
    inner.status, inner.body = status, body
    answer = chat(ask)
    told = error_of(answer, expected, code, "messages" if code == "context_length_exceeded" else None)
    assert told == message


def test_an_application_that_raises_is_a_500_and_the_request_is_finished(ask, inner, engine):
    inner.raises = RuntimeError("a secret")
    assert "secret" not in error_of(chat(ask), 500, "engine_error")
    assert engine.finished == engine.tickets


def test_a_client_that_hangs_up_is_counted_and_its_request_is_finished(inner, engine):
    inner.waits = True
    gateway = Gateway(inner, engine)
    sent = []

    async def go():
        body = json.dumps(CHAT).encode()
        messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

        async def receive():
            await asyncio.sleep(0)
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        await asyncio.wait_for(gateway(scope, receive, send), 5)

    asyncio.run(go())
    assert not sent
    assert engine.finished == engine.tickets
    text = gateway.metrics.text().decode()
    assert "spectr_hangups_total 1.0" in text
    assert 'spectr_requests_total{endpoint="/v1/chat/completions",status="499"} 1.0' in text
    assert "spectr_requests_running 0.0" in text


def test_metrics_count_tokens_by_expert_and_are_for_administrators(ask, engine):
    gateway_text = ""
    chat(ask, experts=["cats"])
    gateway_text = ask.gateway.metrics.text().decode()
    assert 'spectr_tokens_total{expert="cats"} 0.6666' in gateway_text
    assert "spectr_generated_tokens_total 1.0" in gateway_text
    assert 'spectr_expert_suspicion{expert="bees"} 9.31' in gateway_text
    assert "stand_in_up 1" in ask("GET", "/metrics", ADMIN, POLICY).text
    error_of(ask("GET", "/metrics", ALL, POLICY), 403, "admin_required")


def test_a_suspect_is_told_as_one_in_the_list(ask):
    told = {model["id"]: model.get("suspicion") for model in ask("GET", "/v1/models").json()["data"]}
    assert told == {"spectr": None, "spectr/ants": None, "spectr/bees": 9.3, "spectr/cats": None, "tiny": None}


def test_administrators_remove_experts_and_nobody_else_does(ask, engine):
    error_of(ask("DELETE", "/v1/experts/cats", ALL, POLICY), 403, "admin_required")
    error_of(ask("DELETE", "/v1/experts/cats", None, POLICY), 401, "invalid_api_key")
    error_of(ask("DELETE", "/v1/experts/nobody", ADMIN, POLICY), 404, "expert_not_found")
    assert ask("DELETE", "/v1/experts/cats", ADMIN, POLICY).json() == {
        "id": "cats",
        "object": "expert",
        "deleted": True,
    }
    error_of(chat(ask, CATS, POLICY), 404, "model_not_found", "model")
    error_of(chat(ask, ALL, POLICY, experts=["cats"]), 404, "expert_not_found", "experts")


def test_health_is_the_applications_and_needs_no_key(ask, inner):
    assert ask("GET", "/health", policy=POLICY).status_code == 200
    assert inner.asked[0][0] == "/health"


def test_the_composed_model_cannot_have_the_base_models_name(inner, engine):
    with pytest.raises(SpectrError, match="base model's own name"):
        Gateway(inner, engine, served="tiny")


def test_the_page_is_served_without_a_key_and_nothing_beside_it(ask, tmp_path, monkeypatch):
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
