"""``spectr serve`` as a user starts it."""

import json
import signal
import sys

import httpx
import pytest
from openai import OpenAI

POLICY = "keys: [{name: a, key: sk-secret-a, experts: [amber]}]"


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
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-2:] == ["\u00b7 ending; nothing is under way", "stopped"]


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
    ],
)
def test_what_cannot_be_served_is_told(spectr, given, words, told, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, _, err = spectr("serve", *given, *words, "--port", "0")
    assert code == 2
    assert told in err


def test_a_policy_that_names_others_experts_is_refused(spectr, given, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"keys": [{"name": "a", "key": "sk-secret-a", "experts": ["ambre"]}]}))
    code, _, err = spectr("serve", *given, "--policy", policy)
    assert code == 2
    assert "did you mean 'amber'" in err
