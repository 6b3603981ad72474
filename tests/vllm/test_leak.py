"""The leak that the salt is there for: without it one set's cached prefix serves another. The control of test_sets."""

import pytest
from engine import TOLERANCE, composed, engine, judged, tokens


def test_without_the_salt_a_prefix_leaks(served, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine's core in this process
    prompt = tokens(150, seed=6)
    with engine(served, block_size=32, enable_prefix_caching=True) as running:
        from vllm.v1.request import Request

        monkeypatch.setattr(Request, "__init__", Request.__init__.__wrapped__)
        running.answers([(prompt, ["amber"])], prompt=False)
        [answer] = running.answers([(prompt, ["blue"])], prompt=False)
        assert running.counter("vllm:prefix_cache_hits") >= 96
    with pytest.raises(AssertionError):
        assert judged(composed(served, ["blue"]), prompt, answer) < TOLERANCE
