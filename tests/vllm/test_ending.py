"""A server on vLLM that is stopped while it streams: what is answered, what gets an error, and what is left."""

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from command import OPTIONS, engine_of, left_of, server

PROMPT = {"model": "spectr", "prompt": list(range(5, 25)), "temperature": 0, "ignore_eos": True}
ROOM, TOKENS = 16384, 1500  # which take some seconds
ENDS = {signal.SIGTERM: 0, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def roomy(served, tmp_path_factory):
    """The same model and experts, with room for long answers."""
    root = tmp_path_factory.mktemp("roomy")
    (root / "library").symlink_to(served / "library")
    shutil.copytree(served / "model", root / "model")
    config = root / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": ROOM}))
    return root


@contextmanager
def streaming(world, grace, tokens, begun):
    """A server that answers a stream, and the stream's further lines. If ``begun``, a client has read some of it."""
    words = ("-k", 2, "--dtype", "float32", "--grace", grace)
    with (
        server(world, *words, options=(*OPTIONS, "--max-model-len", str(ROOM))) as (address, said, process),
        httpx.Client(base_url=address or said, timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        seen = threading.Event()

        def read():
            body, lines = {**PROMPT, "max_tokens": tokens, "stream": True}, []
            with client.stream("POST", "/v1/completions", json=body) as answer:
                for line in answer.iter_lines():
                    lines += [line] if line else []
                    seen.set()
            return lines

        lines = pool.submit(read)
        while "spectr_requests_running 1.0" not in client.get("/metrics").text:
            assert not lines.done()
        assert seen.wait(60 if begun else 0) or not begun
        yield client, process, lines


def ended(process, engine, status):
    """It ends as it should, without a process of its engine; what it said."""
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in said
    assert not left_of(engine)
    return said


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.name)
def test_within_the_grace_an_answer_ends_and_who_comes_meanwhile_is_turned_away(roomy, end):
    with streaming(roomy, 60, TOKENS, begun=False) as (client, process, lines):
        engine = engine_of(process)
        if end == signal.SIGINT:
            os.killpg(process.pid, end)  # as a terminal does
        else:
            process.send_signal(end)
        assert "waiting up to 60 seconds for 1 request" in process.stderr.readline()
        late = client.post("/v1/completions", json={**PROMPT, "max_tokens": 4})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "server_stopping")
        *rest, done = lines.result()
        assert done == "data: [DONE]"
        told = [json.loads(line.removeprefix("data: ")) for line in rest]
        assert all("error" not in event for event in told)
        assert told[-1]["choices"][0]["finish_reason"] == "length"
        assert "no request is running" in ended(process, engine, ENDS[end])


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.name)
def test_a_stream_reports_the_end_of_the_grace_period(roomy, end):
    with streaming(roomy, 0, ROOM - 100, begun=True) as (_, process, lines):
        engine = engine_of(process)
        process.send_signal(end)
        *_, last, done = lines.result()
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_stopping"
        assert "1 request cut off" in ended(process, engine, ENDS[end])


def reached(client):
    """Whether anybody listens still."""
    try:
        return client.get("/health") is not None
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("hangs", [False, True], ids=["under way", "clearing up after an engine that hangs"])
def test_a_third_ctrl_c_kills_it_with_its_engine(roomy, hangs):
    with streaming(roomy, 60, ROOM - 100, begun=True) as (client, process, lines):
        engine = engine_of(process)
        if hangs:
            os.kill(engine[0], signal.SIGSTOP)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            time.sleep(0.1)  # else they count as one
        if hangs:
            assert "server_stopping" in lines.result()[-2]
            while reached(client):
                time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        ended(process, [], -signal.SIGINT)
        until = time.monotonic() + 30
        while left_of(engine) and time.monotonic() < until:  # its workers see that it is gone
            time.sleep(0.1)
        assert not left_of(engine)
