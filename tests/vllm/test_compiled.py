"""Compiled graphs: the same output as eager, sets and reports at fixed addresses, and removal in a finished graph."""

from engine import NAMES, SETS, TOLERANCE, composed, engine, judged, tokens

from spectr.vllm import ROUTE_ID, ROUTING
from spectr.vllm.routing_records import Listener


def test_a_compiled_graph_sees_sets_reports_and_removals(served, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    listener = Listener()
    listener.expect("one")
    prompt = tokens(20, seed=1)
    with engine(served, eager=False, record=True) as running:
        answers = running.answers([(prompt, experts) for experts in SETS])
        running.answers([(prompt, ["dun"])], new=2, prompt=False, **{ROUTING: "tokens", ROUTE_ID: "one"})
        reports = listener.take("one", tokens=2)
        running.llm.collective_rpc("spectr_remove", args=("cyan",))
        [left] = running.answers([(prompt, ["amber", "cyan"])])
    listener.close()
    for experts, answer in zip(SETS, answers, strict=True):
        assert judged(composed(served, experts), prompt, answer) < TOLERANCE
    assert judged(composed(served, ["amber"]), prompt, left) < TOLERANCE
    assert [report["shares"] for report in reports] == [[[NAMES.index("dun"), 1.0]]] * 2
