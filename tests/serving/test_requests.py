"""The errors that a client gets for wrong requests."""

import json

import pytest

from spectr.serving.api_errors import RefusalError
from spectr.serving.api_fields import ChatRequest, CompletionRequest, parse

TURN = {"role": "user", "content": "what is it"}
TURNS = 'a list with at least one turn: {"role": "user", "content": "..."}'
EXPERTS = "a list with the name of at least one expert; by default all that the key may use"
KIND = 'the kind of this part, "text"'
PART = '{"type": "text", "text": "..."}'
BIAS = "an object with numbers by token, {TOKEN: BIAS}"
STREAM = "\"stream\": true as well, or no 'stream_options'"
OPTIONS = "include_usage, include_obfuscation"
USAGE = "did you mean 'include_usage'? known: include_obfuscation, include_usage"
STOP, CONTENT = "a text, or a list of texts, none of them empty", '{"role": "user", "content": "..."}'
COUNT, PROMPT = "a whole number, at least 1", "a text, a list of texts, or a list of token ids"


def refused(kind, body):
    with pytest.raises(RefusalError) as caught:
        parse(kind, json.dumps(body).encode())
    assert (caught.value.status, caught.value.code) == (400, "invalid_value")
    return caught.value


@pytest.mark.parametrize(
    ("asked", "found", "expected"),
    [
        ({"experts": []}, "'experts' is []", EXPERTS),
        ({"experts": "cats"}, "'experts' is \"cats\"", EXPERTS),
        ({"experts": ["cats", 1]}, "'experts[1]' is 1", EXPERTS),
        ({"router": 3}, "'router' is 3", "a router's name"),
        ({"return_routing": "all"}, "'return_routing' is \"all\"", 'true, false or "layers"'),
        ({"model": None}, "'model' is null", "a name that GET /v1/models lists"),
        ({"messages": "hello"}, "'messages' is \"hello\"", TURNS),
        ({"messages": []}, "'messages' is []", TURNS),
        ({"messages": ["hello"]}, "'messages[0]' is a text of 5 characters", "fields: role, content"),
        ({"messages": [TURN, {"content": "x"}]}, "'messages[1].role' is missing", '"system", "user" or "assistant"'),
        ({"messages": [{**TURN, "content": [{"type": "text"}]}]}, "'messages[0].content[0]' has no text", PART),
        ({"messages": [{**TURN, "content": 3}]}, "'messages[0].content' is 3", f"a text, or a list of parts: {PART}"),
        ({"messages": [{**TURN, "content": [{}]}]}, "'messages[0].content[0].type' is missing", KIND),
        ({"max_tokens": "5"}, "'max_tokens' is \"5\"", COUNT),
        ({"max_completion_tokens": 0}, "'max_completion_tokens' is 0", COUNT),
        ({"n": 0}, "'n' is 0", COUNT),
        ({"temperature": 3}, "'temperature' is 3", "a number from 0 to 2"),
        ({"top_p": 0}, "'top_p' is 0", "a number above 0, at most 1"),
        ({"frequency_penalty": -3}, "'frequency_penalty' is -3", "a number from -2 to 2"),
        ({"stop": [1]}, "'stop[0]' is 1", STOP),
        ({"stop": ""}, "'stop' is \"\"", STOP),
        ({"stop": ["a", ""]}, "'stop[1]' is \"\"", STOP),
        ({"seed": 2**63}, f"'seed' is {2**63}", "a whole number of 64 bits"),
        ({"messages": [{"role": "user", "text": "x"}]}, "'messages[0]' has no content", CONTENT),
        ({"messages": [TURN, {"role": "user", "content": None}]}, "'messages[1]' has no content", CONTENT),
        ({"logit_bias": {"5": "x"}}, "'logit_bias.5' is \"x\"", BIAS),
        ({"stream_options": {}}, "'stream_options' is for streams only", STREAM),
        ({"stream_options": {}, "stream": False}, "'stream_options' is for streams only", STREAM),
        ({"stream_options": [], "stream": True}, "'stream_options' is empty", "fields: " + OPTIONS),
        ({"stream_options": {"include_usage": 1}}, "'stream_options.include_usage' is 1", "true or false"),
        ({"stream_options": {"usage": True}}, "'stream_options.usage' is not a field", USAGE),
        ({"stream": "x" * 100}, "'stream' is \"" + "x" * 59 + " ...", "true or false"),
    ],
)
def test_one_fault_is_reported_with_its_place_what_was_found_and_what_to_write(asked, found, expected):
    error = refused(ChatRequest, {"model": "spectr", "messages": [TURN], **asked})
    assert str(error) == f"{found}; expected: {expected}"
    assert error.param == next(iter(asked))


@pytest.mark.parametrize(
    ("asked", "found"),
    [({}, "'prompt' is missing"), ({"prompt": 3}, "'prompt' is 3"), ({"prompt": [1, "a"]}, "'prompt[0]' is 1")],
)
def test_prompts_of_completions(asked, found):
    assert str(refused(CompletionRequest, {"model": "spectr", **asked})) == f"{found}; expected: {PROMPT}"


def test_several_faults_are_all_reported():
    error = refused(ChatRequest, {"messages": [TURN], "temperature": "hot", "top_p": 2})
    assert str(error).splitlines() == [
        "'model' is missing; expected: a name that GET /v1/models lists",
        "also: 'temperature' is \"hot\"; expected: a number from 0 to 2",
        "also: 'top_p' is 2; expected: a number above 0, at most 1",
    ]
    assert error.param == "model"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("expert", "experts"),
        ("routers", "router"),
        ("return_route", "return_routing"),
        ("max_tokns", "max_tokens"),
        ("temprature", "temperature"),
        ("mesages", "messages"),
    ],
)
def test_a_misspelt_field_is_reported_and_never_widens_the_set(name, meant):
    error = refused(ChatRequest, {"model": "spectr", "messages": [TURN], name: "x"})
    assert f"'{name}' is not a field" in str(error)
    assert f"use '{meant}' if you mean that, or remove the field" in str(error)
    assert error.param == name


def test_all_misspelt_fields_are_reported_and_known_ones_are_not():
    body = json.dumps({"model": "spectr", "messages": [TURN], "topp": 3, "tmperature": 1, "extra_body": {}})
    with pytest.raises(RefusalError) as caught:
        parse(ChatRequest, body.encode(), frozenset({"topp"}))
    first, do, second, put = str(caught.value).splitlines()
    assert (first, second) == (
        "'tmperature' is not a field of this request",
        "also: 'extra_body' is not a field of this request",
    )
    assert do == "  to do: use 'temperature' if you mean that, or remove the field"
    assert caught.value.param == "tmperature"
    assert put.endswith("send its fields next to the others")
    assert "use 'top_p' if" in str(refused(ChatRequest, json.loads(body)))


@pytest.mark.parametrize(
    ("kind", "field", "value", "way"),
    [
        (CompletionRequest, "messages", [TURN], "/v1/chat/completions"),
        (ChatRequest, "prompt", "what is red", "/v1/completions"),
    ],
)
def test_a_field_of_the_other_request_is_sent_there(kind, field, value, way):
    body = json.dumps({"model": "spectr", field: value}).encode()
    with pytest.raises(RefusalError, match=f"send it to {way}") as caught:
        parse(kind, body, frozenset({"messages", "prompt"}))
    assert caught.value.param == field


def test_a_turn_of_the_assistant_may_be_a_call_alone_and_no_stop_is_none():
    turns = [TURN, {"role": "assistant", "tool_calls": []}]
    asked, _ = parse(ChatRequest, json.dumps({"model": "spectr", "messages": turns, "stop": []}).encode())
    assert asked.stop == []


@pytest.mark.parametrize("text", [rb"\ud800", rb"a \uDFFF", b"\xed\xa0\x80"])
def test_half_a_character_is_reported(text):
    with pytest.raises(RefusalError) as caught:
        parse(CompletionRequest, b'{"model": "spectr", "prompt": "' + text + b'"}')
    half = "\\udfff" if b"F" in text else "\\ud800"
    assert str(caught.value) == f"the body is not valid Unicode: '{half}' is half a character\n  expected: Unicode"
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("name", ["user", "metadata", "return_token_ids", "routing", "store", "top_k", "min_tokens"])
def test_other_fields_are_the_engines_matter(name):
    _, told = parse(ChatRequest, json.dumps({"model": "spectr", "messages": [TURN], name: "x"}).encode())
    assert told[name] == "x"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"model=spectr", "not JSON: Expecting value in line 1, column 1"),
        (b'{"model":\n}', "not JSON: Expecting value in line 2, column 1"),
        (b"\xff", "not JSON"),
        (b" ", "empty"),
        (b"[1]", "[1], not an object"),
    ],
)
def test_what_is_no_json_object_is_reported_where(body, found):
    with pytest.raises(RefusalError) as caught:
        parse(ChatRequest, body)
    expected = 'a JSON object, such as {"model": "spectr", ...}'
    assert str(caught.value) == f"the body is {found}\n  expected: {expected}"
    assert caught.value.code == "invalid_json"
