"""``spectr serve`` as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
from openai import OpenAI

POLICY = "keys: [{name: a, key: sk-secret-a, experts: [amber]}]"


@pytest.fixture
def start(given):
    """Start the command in a process of its own; gives its address, once it listens, and what it said."""
    started = []

    def call(*words):
        command = [sys.executable, "-m", "spectr", "serve", *map(str, given), "--port", "0", *map(str, words)]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        started.append(process)
        said = ""
        assert process.stderr is not None
        for line in process.stderr:
            said += line
            if found := re.search(r"at (http://\S+)/v1", line):
                return found[1], said, process
        raise AssertionError(said)

    yield call
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("options", [(), ("--batch", "--cache-tokens", 512)])
def test_it_serves_says_what_and_ends_with_ctrl_c(start, tmp_path, options):
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    address, said, process = start("--policy", policy, "--except", "cyan", *options)
    assert "layers routed among amber, blue, by spectr" in said
    assert str(policy) in said
    with OpenAI(base_url=f"{address}/v1", api_key="sk-secret-a", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["spectr", "spectr/amber"]
        chat = {"messages": [{"role": "user", "content": "what is red"}], "max_tokens": 4}
        answer = client.chat.completions.create(model="spectr", **chat, extra_body={"return_routing": True})
        assert answer.choices[0].routing["experts"] == ["amber"]
    assert httpx.get(f"{address}/health").status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) in (0, 130)


def test_several_routers_are_told_listed_and_answer(start):
    address, said, _ = start(
        "--router", "spectr", "--router", "arrow", "-r", "uniform", "--batch", "--cache-tokens", 512
    )
    assert "by spectr (by request: arrow, uniform)" in said
    assert "router uniform: 0.0 MiB more for its factors" in said
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        assert client.models.retrieve("spectr").model_dump()["routers"] == ["spectr", "arrow", "uniform"]
        chat = {"messages": [{"role": "user", "content": "what is red"}], "max_tokens": 4}
        extra = {"return_routing": "layers", "router": "uniform"}
        answer = client.chat.completions.create(model="spectr", **chat, extra_body=extra)
        taken = {len(layer) for token in answer.choices[0].routing["by_layer"] for layer in token}
        assert taken == {3}  # all of them, always


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--host", "0.0.0.0"), "without a policy"),
        (("--engine", "magic"), "transformers or vllm"),
        (("--engine", "vllm"), "spectr-lora[vllm]"),
        (("--policy", "nowhere.yaml"), "nowhere.yaml"),
        (("--except", "nobody"), "nobody"),
        (("--except", "amber", "--except", "blue", "--except", "cyan"), "no expert"),
        (("--served-name", "model"), "base model's own name"),
        (("--router", "spektr", "--router", "aro"), "did you mean 'spectr'"),
        (("--router", "spektr", "--router", "aro"), "did you mean 'arrow'"),
        (("-r", "spectr", "-r", "arrow", "-r", "spectr"), "--router spectr twice"),
        (("-r", "auto", "-r", "spectr"), "--router spectr twice"),
        (("-r", "spectr", "-r", "calibrated"), "not calibrated"),
        (("-r", "uniform", "-r", "arrow", "-k", "2"), "router 'uniform' does not take these options: top_k"),
    ],
)
def test_what_cannot_be_served_is_told(spectr, given, words, told, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, _, err = spectr("serve", *given, *words, "--port", "0")
    assert code == 2
    assert told in err


def test_a_router_that_holds_one_expert_alone_is_refused_beside_others(spectr, given):
    code, _, err = spectr("serve", *given, "-r", "spectr", "-r", "oracle", "-e", "blue")
    assert code == 2
    assert "--expert blue is for the router that always takes it" in err


def test_vllm_is_given_one_router(spectr, given, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setattr("spectr.cli.serve._check_vllm", lambda: None)
    code, _, err = spectr("serve", *given, "--engine", "vllm", "-r", "spectr", "-r", "uniform")
    assert code == 2
    assert "2 routers: spectr, uniform" in err
    assert "--router spectr alone, or --engine transformers" in err


def test_a_policy_that_names_others_experts_is_refused(spectr, given, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"keys": [{"name": "a", "key": "sk-secret-a", "experts": ["ambre"]}]}))
    code, _, err = spectr("serve", *given, "--policy", policy)
    assert code == 2
    assert "did you mean 'amber'" in err
