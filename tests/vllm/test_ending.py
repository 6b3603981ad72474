"""A server on vLLM that is to end while it streams: who is answered still, who is told so, and what is left."""

import json
import os
import shutil
import signal
from contextlib import contextmanager

import httpx
import pytest
from command import OPTIONS, assert_gone, engine_of, server

PROMPT = {"model": "spectr", "prompt": list(range(5, 25)), "temperature": 0, "ignore_eos": True}
TOKENS = 1500  # some seconds
ENDS = {signal.SIGTERM: 0, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def roomy(served, tmp_path_factory):
    """The same model and experts, with room for long answers."""
    root = tmp_path_factory.mktemp("roomy")
    (root / "library").symlink_to(served / "library")
    shutil.copytree(served / "model", root / "model")
    config = root / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 2048}))
    return root


@contextmanager
def streaming(world, grace):
    """A server that has sent the first event of a long stream; a client of it; and all that follows in the stream."""
    words = ("-k", 2, "--dtype", "float32", "--grace", grace)
    with server(world, *words, options=(*OPTIONS, "--max-model-len", "2048")) as (address, said, process):
        assert address, said
        with httpx.Client(base_url=address, timeout=60) as client:
            assert client.get("/health").status_code == 200
            body = {**PROMPT, "max_tokens": TOKENS, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                lines = (line for line in answer.iter_lines() if line)
                assert "error" not in next(lines)
                yield client, process, lines


def ended(process, engine, status):
    """It ends as it should, without a process of its engine; what it said."""
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in said
    assert_gone(engine)
    return said


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.name)
def test_within_the_grace_an_answer_ends_and_who_comes_meanwhile_is_turned_away(roomy, end):
    with streaming(roomy, 60) as (client, process, lines):
        engine = engine_of(process)
        if end == signal.SIGINT:
            os.killpg(process.pid, end)  # as a terminal does
        else:
            process.send_signal(end)
        assert "1 request under way: 60 seconds" in process.stderr.readline()
        late = client.post("/v1/completions", json={**PROMPT, "max_tokens": 4})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "server_stopping")
        *rest, done = lines
        assert done == "data: [DONE]"
        told = [json.loads(line.removeprefix("data: ")) for line in rest]
        assert all("error" not in event for event in told)
        assert told[-1]["choices"][0]["finish_reason"] == "length"
        assert "nothing is under way" in ended(process, engine, ENDS[end])


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.name)
def test_when_the_grace_is_over_a_stream_says_so(roomy, end):
    with streaming(roomy, 0) as (_, process, lines):
        engine = engine_of(process)
        process.send_signal(end)
        *_, last, done = lines
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_stopping"
        assert "1 request cut off" in ended(process, engine, ENDS[end])
