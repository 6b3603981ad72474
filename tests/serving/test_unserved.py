"""What transformers' serving code would ignore or fail on is refused before it gets there."""

import pytest

from serving import make_engine
from spectr.serving.api_errors import RefusalError
from spectr.serving.engines import Ticket

TURN = {"role": "user", "content": "what is it"}
ROLES = '"system" or "user" or "assistant" or "tool" or "developer"'
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.fixture(scope="module")
def engine(library):
    engine = make_engine(library)
    yield engine
    engine.close()


def refused(engine, body):
    with pytest.raises(RefusalError) as caught:
        engine.admit(Ticket(id="x", experts=("cats",), router="calibrated"), body)
    assert (caught.value.status, caught.value.code) == (400, "unsupported_value")
    assert not engine._running
    return caught.value


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        (
            {**TURN, "role": "asistant"},
            [
                "'messages[1].role' is \"asistant\", which",
                f"expected: {ROLES}",
                'to do: use "assistant" if',
            ],
        ),
        ({**TURN, "role": "x" * 99}, [f"'messages[1].role' is \"{'x' * 59} ..., which", f"expected: {ROLES}"]),
        (
            {**TURN, "content": [{"type": "text", "text": "a"}, IMAGE]},
            ["'messages[1].content[1].type' is \"image_url\", which", 'expected: "text"'],
        ),
    ],
)
def test_a_turn_that_cannot_be_served_is_reported_with_its_place_and_content(engine, turn, told):
    error = refused(engine, {"messages": [TURN, turn]})
    lines = str(error).splitlines()
    assert [line.strip().startswith(words) for line, words in zip(lines, told, strict=True)] == [True] * len(told)
    assert error.param == "messages"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [TURN], "presence_penalty": 1}, "presence_penalty"),
        ({"messages": [TURN], "tools": [{}]}, "tools"),
        ({"messages": [TURN], "n": 2}, "n"),
        ({"prompt": "x", "logit_bias": {"3": 1}}, "logit_bias"),
        ({"prompt": ["x", "y"]}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"messages": [TURN], "reasoning_effort": "high"}, "reasoning_effort"),
        ({"messages": [TURN], "modalities": ["text", "audio"]}, "modalities"),
        ({"messages": [TURN], "logit_bias": {"\u00b2": 1}}, "logit_bias"),
    ],
)
def test_a_field_that_would_be_ignored_is_refused(engine, body, param):
    assert refused(engine, body).param == param


def test_what_makes_no_difference_is_served(engine):
    body = {"messages": [TURN], "presence_penalty": 0, "n": 1, "logit_bias": {"3": 1}}
    ticket = Ticket(id="x", experts=("cats",), router="calibrated")
    assert engine.admit(ticket, {**body, "stop": [], "tools": [], "seed": None}) == {**body, "model": "spectr"}
    engine.finish(ticket)
