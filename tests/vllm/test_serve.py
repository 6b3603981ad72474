"""``spectr serve --engine vllm`` as a user starts it: what it says, answers, and what an engine that dies leaves."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from text_model import make_tokenizer

OPTIONS = ("--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager")
PROMPT = {"model": "spectr", "prompt": list(range(5, 25)), "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def start(served):
    """Starts the command; gives its address, what it said, and the process."""
    make_tokenizer().save_pretrained(served / "model")
    started = []

    def call(*words):
        given = ("--engine", "vllm", "-m", served / "model", "-l", served / "library", "--port", "0", *words)
        command = [sys.executable, "-m", "spectr", "serve", *map(str, given), "--", *OPTIONS]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
        started.append(process)
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"at (http://\S+)/v1", line):
                return found[1], said, process
        process.wait()
        return None, said, process

    yield call
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engine's processes too, which outlive it where it is killed
        process.communicate()


def engine_core(parent):
    """The engine's process, among the children of the one that serves."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError("no engine")


def test_it_answers_and_ends_with_an_engine_that_dies(start):
    address, said, process = start("--except", "dun", "-k", 2, "--dtype", "bfloat16")
    assert "router: spectr, token by token" in said
    assert "14 layers routed among amber, blue, cyan, ecru, by spectr" in said
    with httpx.Client(base_url=address, timeout=60) as client:
        [choice] = client.post("/v1/completions", json={**PROMPT, "return_routing": True}).json()["choices"]
        assert choice["routing"]["experts"] == ["amber", "blue", "cyan", "ecru"]
        totals = [sum(share for _, share in token) for token in choice["routing"]["tokens"]]
        assert len(totals) == 4
        assert all(1 - 4 * 0.001 < total <= 1 for total in totals)  # each of four is told to three digits, rounded down
        assert client.post("/v1/completions", json={**PROMPT, "model": "spectr/dun"}).status_code == 404
        os.kill(engine_core(process.pid), signal.SIGKILL)
        try:
            answer = client.post("/v1/completions", json=PROMPT)
            assert answer.status_code in (500, 503)
            assert answer.json()["error"]["code"] in ("engine_error", "engine_dead")
        except httpx.ConnectError:
            pass  # it has ended already
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "engine has died" in rest


def test_a_router_that_reads_whole_prompts_is_refused_before_anything_starts(start):
    address, said, process = start("-r", "lag")
    assert address is None
    assert process.returncode == 2
    assert "cannot run inside vLLM" in said
