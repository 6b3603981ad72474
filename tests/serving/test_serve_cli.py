"""``spectr serve`` as a user starts it."""

import json
import signal
import socket
import sys

import httpx
import pytest
from openai import OpenAI

from serving import settings
from spectr import ExpertLibrary

POLICY = "keys: [{name: a, key: sk-secret-a, experts: [amber]}]"


@pytest.mark.parametrize("options", [(), ("--batch", "--cache-tokens", 512)])
def test_it_serves_says_what_and_ends_with_ctrl_c(start, tmp_path, options):
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    address, said, process = start("--policy", policy, "--except", "cyan", *options, anew=not options)
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
    assert said.splitlines()[-2:] == ["\u00b7 stopping: no request is running", "stopped"]


@pytest.fixture
def unloaded(monkeypatch):
    """No model may be loaded."""

    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("spectr.cli.options.open_model", load)


def test_several_routers_are_printed_listed_and_answer(start):
    address, said, _ = start(
        "--router", "spectr", "--router", "arrow", "-r", "uniform", "--batch", "--cache-tokens", 512
    )
    assert "by spectr (by request: arrow, uniform)" in said
    assert "router uniform: 0.0 MiB of additional factors" in said
    assert [f"preparing layers for {name}: 14 of 14" in said for name in ("spectr", "arrow", "uniform")] == [True] * 3
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
        (("--host", "0.0.0.0"), "needs a policy"),
        (("--engine", "magic"), "known: transformers, vllm"),
        (("--engine", "vllm"), "spectr-lora[vllm]"),
        (("--policy", "nowhere.yaml"), "nowhere.yaml"),
        (("--except", "nobody"), "nobody"),
        (("--except", "amber", "--except", "blue", "--except", "cyan"), "no expert"),
        (("--served-name", "model"), "base model's own name"),
        (("-r", "spectr,arrow"), "--router spectr --router arrow"),
        (("keys.yaml",), "pass a policy file with --policy"),
        (("--router", "spektr", "--router", "aro"), "did you mean 'spectr'"),
        (("--router", "spektr", "--router", "aro"), "did you mean 'arrow'"),
        (("-r", "spectr", "-r", "arrow", "-r", "spectr"), "--router spectr twice"),
        (("-r", "auto", "-r", "spectr"), "--router spectr twice"),
        (("-r", "spectr", "-r", "calibrated"), "not calibrated"),
        (("-r", "spectr", "--combine", "knots"), "answers would depend on all experts of the server"),
        (("-r", "uniform", "-k", "2"), "router 'uniform' has no top_k"),
        (("-r", "uniform", "-r", "arrow", "--set", "topk=2"), "none of these routers has topk"),
        (("-r", "uniform", "-r", "arrow", "--set", "spectr.top_k=2"), "the router spectr is not used here"),
    ],
)
def test_what_cannot_be_served_is_reported_before_a_model_is_loaded(spectr, given, words, told, monkeypatch, unloaded):
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, _, err = spectr("serve", *given, *words, "--port", "0")
    assert code == 2
    assert told in err


@pytest.mark.parametrize("words", [("-r", "oracle"), ("-r", "oracle", "-e", "blue")])
def test_a_router_that_holds_one_expert_alone_is_refused_next_to_others(spectr, given, words, unloaded):
    code, _, err = spectr("serve", *given, "-r", "spectr", *words, "--served-name", "ours")
    assert code == 2
    assert "the router oracle holds a single expert and cannot be served with other routers" in err
    assert "a request chooses a single expert with the model ours/EXPERT" in err


def test_a_router_of_one_expert_reports_which_there_are(spectr, given, unloaded):
    code, _, err = spectr("serve", *given, "-r", "oracle", "--port", "0")
    assert code == 2
    assert "router 'oracle' needs the setting expert" in err
    assert err.endswith("  expected: one of amber, blue, cyan\n  to do: -r oracle -e NAME\n")


def test_help_shows_the_options_of_the_engine_once_and_the_default_router(spectr):
    code, out, _ = spectr("serve", "--help")
    assert code == 0
    words = " ".join(out.replace("\u2502", " ").split())
    assert "serve [OPTIONS] [-- OPTIONS]..." in words
    assert "vllm offers all but glider, lag, oracle and shortlist. [default: (auto)]" in words


def test_vllm_is_given_routers_that_it_can_run(spectr, given, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setattr("spectr.serving.engines.launchers.Vllm.check", lambda *_: None)
    code, _, err = spectr("serve", *given, "--engine", "vllm", "-r", "spectr", "-r", "lag")
    assert code == 2
    assert "this router cannot run inside vLLM: Lag(" in err
    assert "expected: one that decides for each token" in err


def test_a_port_that_is_taken_is_reported_before_a_model_is_loaded(spectr, given, unloaded):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code, _, err = spectr("serve", *given, "--port", other.getsockname()[1])
    assert code == 2
    assert "Address already in use" in err
    assert "choose others with --host and --port" in err


def test_a_port_of_a_server_that_still_loads_is_taken(spectr, given, world, unloaded):
    loading = settings(ExpertLibrary.open(world / "adapters"), "amber")
    with loading.listen() as bound:
        code, _, err = spectr("serve", *given, "--port", bound.getsockname()[1])
    assert code == 2
    assert "Address already in use" in err


@pytest.mark.parametrize("lacks", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_extra_is_reported_before_a_model_is_loaded(spectr, given, lacks, monkeypatch, unloaded):
    monkeypatch.setattr("spectr.serving.engines.transformers.find_spec", lambda name: name != lacks)
    if lacks == "prometheus_client":
        monkeypatch.setitem(sys.modules, "spectr.serving.run", None)  # as if it could not be imported
    code, _, err = spectr("serve", *given, "--port", "0")
    assert code == 2
    assert 'pip install "spectr-lora[serve]"' in err


def test_a_policy_that_names_others_experts_is_refused(spectr, given, tmp_path, unloaded):
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"keys": [{"name": "a", "key": "sk-secret-a", "experts": ["ambre"]}]}))
    code, _, err = spectr("serve", *given, "--policy", policy)
    assert code == 2
    assert "did you mean 'amber'" in err
