"""One engine, many requests: parity with transformers, sets of experts that do not touch each other, removal."""

import pytest
from engine import SETS, TOLERANCE, assert_alike, composed, engine, judged, tokens

LONG = tokens(150, seed=5)  # several blocks of cache, and more than one step of 64 tokens


@pytest.fixture(scope="module")
def running(served):
    """Chunked prefill by steps of 64 tokens, cached prefixes by blocks of 32."""
    with engine(served, max_num_batched_tokens=64, block_size=32, enable_prefix_caching=True) as one:
        yield one


def test_all_layers_are_routed(running):
    assert running.status()["layers"] == 8
    assert running.status()["modules"] == 14


@pytest.mark.parametrize("experts", SETS, ids=str)
def test_output_is_that_of_transformers(running, served, experts):
    prompt = tokens(20, seed=1)
    [answer] = running.answers([(prompt, experts)], new=12)
    assert judged(composed(served, experts), prompt, answer) < TOLERANCE
    other = composed(served, ["ecru"])
    with pytest.raises(AssertionError):  # the judge tells sets apart
        assert judged(other, prompt, answer) < TOLERANCE


def test_a_mixed_batch_is_each_of_its_requests_alone(running, served):
    requests = [(tokens(10 + 7 * n, seed=n), experts) for n, experts in enumerate(SETS + SETS)]
    for (prompt, experts), answer in zip(requests, running.answers(requests), strict=True):
        assert judged(composed(served, experts), prompt, answer) < TOLERANCE


@pytest.mark.parametrize("experts", [["nobody"], ["amber", "nobody"], [], ["amber", 3], 7, [["amber"]], ""], ids=str)
def test_what_is_unknown_or_malformed_gets_the_base_model_alone(running, served, experts):
    prompt = tokens(20, seed=2)
    bad, good = running.answers([(prompt, experts), (prompt, ["amber"])])
    assert judged(composed(served, []), prompt, bad) < TOLERANCE
    assert judged(composed(served, ["amber"]), prompt, good) < TOLERANCE


def test_names_may_come_as_text_with_commas(running):
    prompt = tokens(20, seed=2)
    one, other = running.answers([(prompt, "cyan, amber"), (prompt, ["amber", "cyan"])])
    assert_alike(one, other)


def test_chunked_prefill(running, served):
    [answer] = running.answers([(LONG, ["blue"])])
    assert judged(composed(served, ["blue"]), LONG, answer) < TOLERANCE


def test_no_set_uses_a_prefix_that_another_computed(running, served):
    """The leak: the same prompt for one set, then for another, whose cached blocks would fit by their tokens."""
    prompt = tokens(150, seed=6)

    def ask(experts):
        before = running.counter("vllm:prefix_cache_hits")
        [answer] = running.answers([(prompt, experts)], prompt=False)
        return answer, running.counter("vllm:prefix_cache_hits") - before

    ask(["amber"])
    for experts in (["blue"], ["amber", "blue"], None, ["nobody"]):
        answer, hits = ask(experts)
        assert hits == 0
        assert judged(composed(served, [] if experts == ["nobody"] else experts), prompt, answer) < TOLERANCE
    answer, hits = ask(["amber"])  # within a set the cache goes on working
    assert hits >= 96
    assert judged(composed(served, ["amber"]), prompt, answer) < TOLERANCE


def test_a_removed_expert_is_gone_for_the_next_request(running, served):
    """Last, as it changes the engine."""
    prompt = tokens(150, seed=7)
    running.answers([(prompt, None), (prompt, ["cyan", "ecru"])], prompt=False)
    [left] = running.llm.collective_rpc("spectr_remove", args=("ecru",))
    assert left["experts"] == ["amber", "blue", "cyan", "dun"]
    answers = running.answers([(prompt, None), (prompt, ["ecru"]), (prompt, ["cyan", "ecru"])], prompt=False)
    for experts, answer in zip((["amber", "blue", "cyan", "dun"], [], ["cyan"]), answers, strict=True):
        assert judged(composed(served, experts), prompt, answer) < TOLERANCE
