"""Two ranks: the same output as one, and proof that the sum over ranks before the norm is what makes it so."""

import pytest
from engine import SETS, TOLERANCE, composed, engine, judged, tokens

PROMPT = tokens(20, seed=1)


@pytest.mark.parametrize("name", ["spectr", "arrow"])
def test_two_ranks_give_the_output_of_one_and_closed_access_is_the_base_model(served, name):
    router = {"name": name, "top_k": 2}
    with engine(served, router=router, tensor_parallel_size=2, access="closed") as running:
        answers = running.answers([(PROMPT, experts) for experts in SETS])
    for experts, answer in zip(SETS, answers, strict=True):
        assert judged(composed(served, experts or [], router), PROMPT, answer) < TOLERANCE


def test_without_the_sum_over_ranks_it_is_another_output(served):
    """The negative control."""
    with engine(served, tensor_parallel_size=2, worker_extension_cls="unsummed.Unsummed") as running:
        [answer] = running.answers([(PROMPT, ["blue", "cyan", "dun"])])
    with pytest.raises(AssertionError):
        assert judged(composed(served, ["blue", "cyan", "dun"]), PROMPT, answer) < 0.05
