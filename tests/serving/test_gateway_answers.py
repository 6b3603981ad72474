"""The gateway alone, around a stand-in for an engine: what becomes of its answers."""

import asyncio
import json

import pytest

from inner import CHAT, WHOLE, chat, error_of
from spectr.serving.gateway import Gateway

UNKNOWN = b"{\"detail\": \"Unexpected fields in the request: {'b', 'a'}\"}"
TOO_LONG = b'{"error": {"message": "too long", "code": "context_length_exceeded", "param": "messages"}}'


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
def test_a_streams_usage_is_always_counted_and_sent_on_request(ask, inner, own):
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
        (422, UNKNOWN, 400, "invalid_request", "'a', 'b': not supported by this engine\n  to do: remove them"),
        (400, b'{"detail": [{"loc": 1}]}', 400, "invalid_request", '[{"loc": 1}]'),
        (400, TOO_LONG, 400, "context_length_exceeded", "too long"),
        (503, b'{"error": "secret"}', 503, "engine_error", "the engine cannot take requests now"),
        (500, b"Internal secret", 500, "engine_error", "the engine failed on this request"),
    ],
)
def test_an_applications_errors_become_standard_ones(ask, inner, status, body, expected, code, message):
    inner.status, inner.body = status, body
    answer = chat(ask)
    params = {UNKNOWN: "a", TOO_LONG: "messages"}
    told = error_of(answer, expected, code, params.get(body))
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
