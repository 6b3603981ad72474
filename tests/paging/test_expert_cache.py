"""The cache of experts, and who leaves it."""

from __future__ import annotations

import pytest
import torch

from spectr.errors import CompositionError, LibraryError
from spectr.paging import ExpertCache, Lfu, Lru, Polar, get_policy
from spectr.spectral import Share

SIZE = 4 * (2 * 3 + 5 * 2)  # bytes of one expert


def share(name):
    if name == "broken":
        raise LibraryError("broken")
    return {"layer": Share(torch.full((2, 3), float(ord(name[0]))), torch.zeros(5, 2))}


def shelf(room, policy=None):
    return ExpertCache(share, room * SIZE, policy or Lru())


def test_it_never_holds_more_than_it_may():
    full = shelf(2)
    for name in "abcabc":
        assert full.fetch([name])[name]["layer"].A[0, 0] == ord(name)
        assert full.bytes <= 2 * SIZE
    assert full.figures.hits == 0
    assert full.figures.misses == 6
    assert full.figures.evictions == 4


def test_what_is_there_is_not_loaded_again():
    full = shelf(2)
    for name in "aababb":
        full.fetch([name])
    assert (full.figures.hits, full.figures.misses) == (4, 2)
    assert full.figures.hit_rate == pytest.approx(4 / 6)


def test_a_call_for_more_than_fits_is_answered():
    full = shelf(2)
    assert set(full.fetch(list("abcd"))) == set("abcd")
    assert full.bytes <= 2 * SIZE


def test_those_of_one_call_do_not_push_each_other_out():
    full = shelf(3)
    full.fetch(list("abc"))
    full.fetch(list("ad"))
    assert set("ad") < set(full.experts)


def test_a_fault_leaves_it_as_it_was():
    full = shelf(2)
    full.fetch(["a"])
    with pytest.raises(LibraryError):
        full.fetch(["b", "broken"])
    assert full.experts == ("a",)


def test_lru_lets_the_longest_unused_go():
    full = shelf(2, Lru())
    for name in "abac":
        full.fetch([name])
    assert full.experts == ("a", "c")


def test_lfu_lets_the_least_used_go():
    full = shelf(2, Lfu())
    for name in "aaabc":
        full.fetch([name])
    assert full.experts == ("a", "c")
    full.fetch(["b"])
    assert full.experts == ("a", "b")


def test_lfu_that_forgets_follows_a_change():
    steady, ageing = shelf(2, Lfu()), shelf(2, Lfu(half_life=3))
    for name in "a" * 30 + "bc" * 6:
        steady.fetch([name])
        ageing.fetch([name])
    assert "a" in steady.experts
    assert ageing.experts == ("b", "c")


def test_a_count_never_overflows():
    policy = Lfu(half_life=0.01)
    for name in "ab" * 50:
        policy.used(name, None)
    assert policy.victim(["a", "b"]) == "a"


def test_polar_learns_who_goes_with_which_context():
    """After an epoch of one context its experts stay, though others were used as often in all."""
    policy = Polar(epoch=20, half_life=1e6)
    morning, evening = torch.tensor([5.0, 0.0]), torch.tensor([0.0, 5.0])
    for _ in range(20):
        policy.used("a", morning)
    for _ in range(20):
        policy.used("b", evening)
    assert policy.victim(["a", "b"]) == "a"
    for _ in range(20):
        policy.used("c", morning)
    assert policy.victim(["a", "b"]) == "b"
    assert policy.victim(["a", "b", "new"]) == "new"


def test_policies_have_names():
    assert isinstance(get_policy("lru"), Lru)
    with pytest.raises(CompositionError, match="lfu"):
        get_policy("lfo")
