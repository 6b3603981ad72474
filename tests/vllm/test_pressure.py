"""Too little cache for all requests: some are preempted and computed again, with the sets that they had."""

from engine import SETS, TOLERANCE, composed, engine, judged, tokens


def test_preempted_requests_keep_their_sets(served):
    requests = [(tokens(60, seed=n), experts) for n, experts in enumerate(SETS)]
    with engine(served, block_size=32, num_gpu_blocks_override=10, enable_prefix_caching=True) as running:
        answers = running.answers(requests, new=60, prompt=False)
        assert running.counter("vllm:num_preemptions") > 0
    for (prompt, experts), answer in zip(requests, answers, strict=True):
        assert judged(composed(served, experts), prompt, answer) < TOLERANCE
