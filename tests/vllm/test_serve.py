"""``spectr serve --engine vllm``: what it says at start, what it refuses, and what an engine that dies leaves."""

import os
import signal

import httpx
from command import engine_of, left_of, server

PROMPT = {"model": "spectr", "prompt": list(range(5, 25)), "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def test_it_answers_and_ends_with_an_engine_that_dies(served):
    with server(served, "--except", "dun", "-k", 2, "--dtype", "bfloat16") as (address, said, process):
        assert "router: spectr, which decides for each token" in said
        assert "14 layers routed among amber, blue, cyan, ecru, by spectr" in said
        with httpx.Client(base_url=address, timeout=60) as client:
            [choice] = client.post("/v1/completions", json={**PROMPT, "return_routing": True}).json()["choices"]
            assert choice["routing"]["experts"] == ["amber", "blue", "cyan", "ecru"]
            totals = [sum(share for _, share in token) for token in choice["routing"]["tokens"]]
            assert len(totals) == 4
            assert all(1 - 4 * 0.001 < total <= 1 for total in totals)  # each of four has three digits, rounded down
            assert client.post("/v1/completions", json={**PROMPT, "model": "spectr/dun"}).status_code == 404
            os.kill(engine_of(process)[0], signal.SIGKILL)
            try:
                answer = client.post("/v1/completions", json=PROMPT)
                assert answer.status_code in (500, 503)
                assert answer.json()["error"]["code"] in ("engine_error", "engine_dead")
            except httpx.ConnectError:
                pass  # it has ended already
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "engine stopped unexpectedly" in rest


def test_a_router_that_reads_whole_prompts_is_refused_before_anything_starts(served):
    with server(served, "-r", "lag") as (address, said, process):
        assert address is None
        assert process.returncode == 2
        assert "cannot run inside vLLM" in said


def test_terminated_it_ends_with_its_engine(served):
    with server(served, "-k", 2, "--no-record", "--dtype", "bfloat16") as (address, _, process):
        with httpx.Client(base_url=address, timeout=60) as client:
            assert client.post("/v1/completions", json=PROMPT).status_code == 200
        engine = engine_of(process)
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert not left_of(engine)
