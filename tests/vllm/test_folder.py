"""A composed folder of the default model with the shipped experts: parity, reports, and one compiled graph."""

import pytest
import torch
from engine import TOLERANCE, Engine, judged

import spectr
from spectr.shipped import shipped_experts
from spectr.vllm import ROUTE_ID, ROUTING
from spectr.vllm.routing_records import Listener

QUESTION = "Is the sentiment of this movie review positive or negative?\n\nA dull, lifeless film."
SETS = (None, ["sst2"], ["agnews", "mnli", "qqp"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, tokenizer = spectr.models.load_model(dtype="float32", device="cpu")
    routed = spectr.compose(model, shipped_experts(), spectr.Calibrated(level="token", top_k=4))
    return spectr.save_composed(routed, tokenizer, tmp_path_factory.mktemp("made") / "folder", record=True)


@pytest.fixture(scope="module")
def judge(folder):
    return spectr.load_composed(folder, dtype="float32")


@pytest.fixture(scope="module")
def prompt(judge):
    chat = [{"role": "user", "content": QUESTION}]
    return list(judge[1].apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


@pytest.fixture(scope="module")
def listener():
    one = Listener()
    yield one
    one.close()


@pytest.fixture(scope="module")
def running(folder, listener):
    from vllm import LLM

    options = {"max_model_len": 256, "max_num_seqs": 8, "dtype": "float32", "disable_log_stats": False}
    llm = LLM(str(folder), enforce_eager=True, **options)
    yield Engine(llm)
    llm.llm_engine.engine_core.shutdown()


def test_a_folder_is_served_as_it_is_loaded(running, judge, prompt):
    assert running.status()["modules"] == len(judge[0].layers) == 210
    answers = running.answers([(prompt, experts) for experts in SETS])
    for experts, answer in zip(SETS, answers, strict=True):
        judge[0].allow(experts)
        assert judged(judge[0].model, prompt, answer) < TOLERANCE
    judge[0].allow(None)


def test_reports_say_what_a_trace_says(running, judge, prompt, listener):
    routed, _ = judge
    extra = {ROUTING: "layers", ROUTE_ID: "one"}
    listener.expect("one")
    [answer] = running.answers([(prompt, ["agnews", "mnli", "qqp", "sst2", "cola"])], new=4, prompt=False, **extra)
    reports = listener.take("one", tokens=4)
    assert [report["token"] for report in reports] == [0, 1, 2, 3]
    assert listener.experts == routed.library.names
    assert set(listener.layers) == set(routed.layers)
    routed.allow(["agnews", "mnli", "qqp", "sst2", "cola"])
    with spectr.trace(routed.model) as trace, torch.no_grad():
        routed.model(torch.tensor([prompt + answer.ids]))
    routed.allow(None)
    for number, report in enumerate(reports):
        assert report["shares"] == sorted(report["shares"], key=lambda pair: -pair[1])
        assert sum(share for _, share in report["shares"]) <= 1 + 1e-5
        for layer, chosen in zip(listener.layers, report["by_layer"], strict=True):
            assert len(chosen) == 4
            kept = trace[layer]
            at = len(prompt) - 1 + number
            scores = dict(zip(kept.experts, kept.scores[0, at].tolist(), strict=True))
            told = {listener.experts[e]: (weight, score) for e, weight, score in chosen}
            assert told == {e: (0.25, pytest.approx(scores[e], abs=2e-3)) for e in kept.chosen(0, at)}


def test_nobody_else_is_reported(running, prompt, listener):
    for name in ("bad", "good"):
        listener.expect(name)
    running.answers([(prompt, None)], new=2, prompt=False, **{ROUTING: "everything", ROUTE_ID: "bad"})
    running.answers([(prompt, None)], new=2, prompt=False, **{ROUTING: "tokens", ROUTE_ID: "good"})
    [first, second] = listener.take("good", tokens=2)
    assert set(first) == {"id", "request", "token", "shares"}
    assert listener.take("bad") == []
    assert second["token"] == 1
