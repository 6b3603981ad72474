"""One started server and its clients: chats, streams, keys, metrics, removal, and its end. In this order."""

import json
import re
import signal

import httpx
import pytest
from command import engine_of, left_of, server

KEYS = {"a": "sk-team-a-1234", "b": "sk-team-b-5678", "ops": "sk-operations-90"}
POLICY = f"""
keys:
  - {{name: a, key: {KEYS["a"]}, experts: [amber, blue]}}
  - {{name: b, key: {KEYS["b"]}, experts: [blue, cyan, dun], base: true}}
  - {{name: ops, key: {KEYS["ops"]}, admin: true}}
except: [ecru]
"""
CHAT = {"model": "spectr", "messages": [{"role": "user", "content": "is the sky red"}], "max_tokens": 6}
EXACT = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def running(served, tmp_path_factory):
    policy = tmp_path_factory.mktemp("keys") / "policy.yaml"
    policy.write_text(POLICY)
    with server(served, "--policy", policy, "-k", 2, "--dtype", "float32") as one:
        assert one.address is not None, one.said
        yield one


@pytest.fixture
def ask(running):
    """Sends a request with a key."""
    with httpx.Client(base_url=running.address, timeout=60) as client:

        def call(path, key, method="POST", **body):
            headers = {"authorization": f"Bearer {KEYS[key]}"}
            return client.request(method, path, headers=headers, json={**CHAT, **EXACT, **body} if body else None)

        yield call


def chat(ask, key, **body):
    answer = ask("/v1/chat/completions", key, **{"model": "spectr", **body})
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    return choice["message"]["content"], choice.get("routing")


def refused(ask, key, **body):
    answer = ask("/v1/chat/completions", key, **{"model": "spectr", **body})
    return answer.status_code, answer.json()["error"]["code"]


def used(routing):
    return {routing["experts"][number] for token in routing["tokens"] for number, _ in token}


def test_each_key_sees_and_gets_its_own_experts(ask):
    names = {key: {model["id"] for model in ask("/v1/models", key, "GET").json()["data"]} for key in ("a", "b")}
    assert names["a"] == {"spectr", "spectr/amber", "spectr/blue"}
    assert names["b"] == {"spectr", "spectr/blue", "spectr/cyan", "spectr/dun", "model"}
    (one, by_a), (other, by_b) = (chat(ask, key, return_routing=True) for key in ("a", "b"))
    assert (by_a["experts"], by_b["experts"]) == (["amber", "blue"], ["blue", "cyan", "dun"])
    assert used(by_a) <= {"amber", "blue"}
    assert used(by_b) <= {"blue", "cyan", "dun"}
    assert one != other
    base, none = chat(ask, "b", model="model")
    assert none is None
    assert base not in (one, other)


def test_a_request_narrows_its_keys_set_and_never_widens_it(ask):
    text, routing = chat(ask, "b", experts=["blue"], return_routing=True)
    assert routing["experts"] == ["blue"]
    assert routing["tokens"] == [[[0, 1.0]]] * 6
    assert (text, None) == chat(ask, "a", model="spectr/blue")  # the same set is the same answer, whoever asks
    for denied in ("amber", "ecru", "nobody"):  # another key's, nobody's, and one that does not exist: one answer
        assert refused(ask, "b", experts=["blue", denied]) == (404, "expert_not_found")
        assert refused(ask, "b", model=f"spectr/{denied}") == (404, "model_not_found")
    assert refused(ask, "a", model="model") == (404, "model_not_found")
    assert refused(ask, "ops") == (404, "model_not_found")


def test_a_stream_is_the_whole_answer_with_its_routing(ask, running):
    body = {**CHAT, **EXACT, "experts": ["cyan", "dun"], "return_routing": "layers", "stream": True}
    pieces, ended = [], False
    headers = {"authorization": f"Bearer {KEYS['b']}"}
    with httpx.stream("POST", f"{running.address}/v1/chat/completions", headers=headers, json=body, timeout=60) as got:
        for line in got.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                pieces += json.loads(line.removeprefix("data: "))["choices"]
    assert ended
    text, routing = chat(ask, "b", experts=["cyan", "dun"], return_routing="layers")
    assert "".join(piece["delta"].get("content") or "" for piece in pieces) == text
    for field in ("tokens", "by_layer"):
        assert [token for piece in pieces for token in piece["routing"].get(field, ())] == routing[field]
    assert len(routing["tokens"]) == 6
    assert [len(layers) for layers in routing["by_layer"]] == [14] * 6


def test_tokens_by_expert_are_counted_for_administrators(ask):
    def counted():
        text = ask("/metrics", "ops", "GET").text
        found = re.findall(r'^spectr_tokens_total\{expert="(\w+)"\} (\S+)', text, re.MULTILINE)
        assert "vllm:" in text
        return {expert: float(value) for expert, value in found}

    assert ask("/metrics", "a", "GET").status_code == 403
    before = counted()
    chat(ask, "b", experts=["dun"])
    after = counted()
    assert {expert: after[expert] - before.get(expert, 0) for expert in after} == {
        expert: pytest.approx(6 if expert == "dun" else 0) for expert in after
    }


def test_a_removed_expert_is_gone_for_the_next_request(ask):
    blue, _ = chat(ask, "b", experts=["blue"])
    both, _ = chat(ask, "b", experts=["blue", "cyan"])
    assert blue != both
    assert ask("/v1/experts/cyan", "b", "DELETE").status_code == 403
    assert ask("/v1/experts/cyan", "ops", "DELETE").json() == {"id": "cyan", "object": "expert", "deleted": True}
    assert refused(ask, "b", experts=["blue", "cyan"]) == (404, "expert_not_found")
    assert refused(ask, "b", model="spectr/cyan") == (404, "model_not_found")
    assert (blue, None) == chat(ask, "b", experts=["blue"])
    _, routing = chat(ask, "b", return_routing=True)
    assert routing["experts"] == ["blue", "dun"]


def test_interrupted_it_ends_with_its_engine(running):
    engine = engine_of(running.process)
    running.process.send_signal(signal.SIGINT)
    _, rest = running.process.communicate(timeout=60)
    assert running.process.returncode == 130  # as a shell has it: ended by Ctrl-C
    assert "stopping: no request is running" in rest
    assert "Traceback" not in rest
    assert not left_of(engine)
