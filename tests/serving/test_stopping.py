"""A server that is to end: what becomes of the answers under way, and of requests that come too late."""

import json
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai import OpenAI

CHAT = {"model": "spectr", "messages": [{"role": "user", "content": "what is red"}], "temperature": 0}
LONG = {**CHAT, "max_tokens": 100_000}


@pytest.fixture(scope="module")
def endless(world, tmp_path_factory):
    """The tiny model, which never ends an answer by itself."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(world / "model", folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["eos_token_id"] = None
        if name == "config.json":
            settings["max_position_embeddings"] = 200_000
        (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.fixture(params=[(), ("--batch", "--cache-tokens", 100_000)], ids=["one by one", "batch"])
def running(request, start, endless):
    """A started server on which a stream and three whole answers are under way; and those who read them."""
    address, _, process = start("--model", endless, *request.param, "--grace", "4")
    begun, pool = threading.Event(), ThreadPoolExecutor(4)

    def stream():
        with httpx.stream("POST", f"{address}/v1/chat/completions", json={**LONG, "stream": True}, timeout=60) as told:
            text = ""
            for part in told.iter_text():
                text += part
                begun.set()
            return text

    def whole():
        return httpx.post(f"{address}/v1/chat/completions", json=LONG, timeout=60)

    streamed = pool.submit(stream)
    assert begun.wait(30)
    wholes = [pool.submit(whole) for _ in range(3)]
    while "spectr_requests_running 4.0" not in httpx.get(f"{address}/metrics").text:
        time.sleep(0.02)
    yield address, process, streamed, wholes
    pool.shutdown()


def rest(process):
    """What it said until it ended, and how it ended."""
    _, said = process.communicate(timeout=30)
    assert "Traceback" not in said
    assert "Exception" not in said
    return said, process.returncode


def told_why(streamed, wholes):
    """All waiting clients got the reason why there is no answer."""
    *_, last, done, end = streamed.result().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    errors = [json.loads(last.removeprefix("data: "))["error"]]
    for whole in wholes:
        answer = whole.result()
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "10"
        errors.append(answer.json()["error"])
    for error in errors:
        assert (error["code"], error["type"], error["param"]) == ("server_stopping", "server_error", None)


def test_requests_get_an_error_after_the_grace_period_and_new_ones_at_once(running):
    address, process, streamed, wholes = running
    # Clients take longer to make than the grace lasts on a busy machine.
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client, httpx.Client() as plain:
        process.send_signal(signal.SIGTERM)
        said = process.stderr.readline()
        assert "waiting up to 4 seconds for 4 requests" in said
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**CHAT)
        assert caught.value.code == "server_stopping"
        for path in ("/v1/models", "/health", "/"):
            late = plain.get(f"{address}{path}")
            assert (late.status_code, late.headers["retry-after"]) == (503, "10")
            assert late.json()["error"]["code"] == "server_stopping"
    assert not streamed.done()
    told_why(streamed, wholes)
    said, status = rest(process)
    assert status == 0
    assert "4 requests cut off" in said


def test_ctrl_c_again_ends_at_once(running):
    _, process, streamed, wholes = running
    process.send_signal(signal.SIGINT)
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    told_why(streamed, wholes)
    said, status = rest(process)
    assert status == 130
    assert "4 requests cut off" in said
    assert said.splitlines()[-1] == "stopped"


def test_a_third_ctrl_c_kills_it(running):
    _, process, _, _ = running
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)  # else they count as one
    said, status = rest(process)
    assert status == -signal.SIGINT
    assert "stopped" not in said


def test_an_answer_that_is_done_within_the_grace_is_whole(start, endless):
    address, _, process = start("--model", endless, "--grace", "60")
    body = {**CHAT, "max_tokens": 400}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json={**body, "stream": True}, timeout=60) as told:
        parts = told.iter_text()
        text = next(parts)
        process.send_signal(signal.SIGTERM)
        text += "".join(parts)
    events = [json.loads(event[6:]) for event in text.split("\n\n") if event.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert text.endswith("data: [DONE]\n\n")
    said, status = rest(process)
    assert status == 0
    assert "no request is running" in said
