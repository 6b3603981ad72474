"""The simulated workloads that benchmarks/paging.py compares cache policies on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from simulate import simulate
from spectr.paging import Lfu, Lru
from workload import Workload


def test_a_workload_is_the_same_each_time():
    first, again = (list(Workload(experts=50, drift=30).prompts(100)) for _ in range(2))
    assert [expert for expert, _ in first] == [expert for expert, _ in again]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))


def test_popularity_follows_the_law():
    """Within a topic the first expert is called for about twice as often as the second."""
    calls = Counter(expert for expert, _ in Workload(experts=40, topics=4, exponent=1.0).prompts(8000))
    firsts, seconds = (sum(calls[f"{4 * rank + topic:05}"] for topic in range(4)) for rank in (0, 1))
    assert firsts / seconds == pytest.approx(2, rel=0.15)


def test_drift_changes_what_is_popular():
    calls = [expert for expert, _ in Workload(experts=40, topics=8, exponent=2.0, drift=500, seed=1).prompts(8000)]
    first, last = (Counter(part).most_common(1)[0][0] for part in (calls[:500], calls[-500:]))
    assert first != last


def test_room_for_all_never_misses_once_warm():
    result = simulate(Workload(experts=10, topics=2), Lru(), room=10, prompts=2000, load_ms=30)
    assert (result.hit_rate, result.added) == (1, 0)


def test_what_misses_cost_is_what_is_added():
    result = simulate(Workload(experts=200), Lfu(), room=20, prompts=2000, load_ms=30)
    assert result.added == pytest.approx(30 * (1 - result.hit_rate))


def test_counting_beats_recency_where_calls_are_independent():
    work = Workload(experts=500)
    lru, lfu = (simulate(work, policy, room=25, prompts=4000, load_ms=1) for policy in (Lru(), Lfu()))
    assert lfu.hit_rate > lru.hit_rate
