"""From scores to weights, against the reference, score by score."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from models import types_unchecked
from spectr.errors import CompositionError
from spectr.selection import All, TopK, largest, select_among
from spectr.spectral import reference

SCORES = st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=8, unique=True)


def weights_of(select, scores):
    return select(torch.tensor([scores], dtype=torch.float32))[0]


@settings(max_examples=80, deadline=None)
@given(SCORES, st.integers(1, 10))
def test_uniform_top_k_equals_the_reference(scores, k):
    weights = weights_of(TopK(k=k), scores)
    torch.testing.assert_close(weights, torch.tensor(reference.uniform_weights(scores, k)), rtol=1e-6, atol=0)


@settings(max_examples=80, deadline=None)
@given(SCORES, st.integers(1, 10), st.sampled_from([0.1, 1.0, 7.0, 1e3]))
def test_softmax_top_k_equals_the_reference(scores, k, temperature):
    weights = weights_of(TopK(k=k, weighting="softmax", temperature=temperature), scores)
    expected = torch.tensor(reference.softmax_weights(scores, k, temperature))
    # one unit in the last place of a score of s moves an exponent by s * eps / temperature
    wobble = 2**-23 * max(scores) / temperature
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6 + wobble)


@settings(max_examples=40, deadline=None)
@given(SCORES)
def test_everyone_weighs_all_alike(scores):
    assert weights_of(All(), scores).tolist() == pytest.approx([1 / len(scores)] * len(scores))


@settings(max_examples=40, deadline=None)
@given(SCORES, st.integers(1, 10), st.sampled_from(["uniform", "softmax"]))
def test_weights_sum_to_one_and_only_the_largest_scores_have_some(scores, k, weighting):
    weights = weights_of(TopK(k=k, weighting=weighting, temperature=1e4), scores)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    assert set(weights.nonzero().flatten().tolist()) == set(reference.top_k(scores, k))


@pytest.mark.parametrize("select", [TopK(k=2), TopK(k=2, weighting="softmax"), All()])
def test_leading_axes_are_tokens_of_their_own(select):
    scores = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    together = select(scores)
    assert together.shape == scores.shape
    assert together.dtype == torch.float32
    for b in range(2):
        for t in range(3):
            assert torch.equal(together[b, t], select(scores[b, t]))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_exactly_k_are_taken_of_equal_scores(k):
    assert int((TopK(k=k)(torch.ones(5, 3)) > 0).sum(-1).unique()) == k


@pytest.mark.parametrize("experts", [5, 40])  # few are sorted, of many ties are repaired
@pytest.mark.parametrize("k", [1, 3, 5])
def test_of_equal_scores_the_first_are_taken(experts, k):
    scores_TE = torch.randint(0, 4, (50, experts), generator=torch.Generator().manual_seed(k)).float()
    expected_TK = scores_TE.argsort(dim=-1, descending=True, stable=True)[:, :k]
    assert torch.equal(largest(scores_TE, k)[1].sort(-1).values, expected_TK.sort(-1).values)


def test_scores_of_zero_are_weighed_like_any_other():
    assert weights_of(TopK(k=2), [0.0, 0.0, 0.0]).sum() == 1
    assert weights_of(TopK(k=2, weighting="softmax"), [0.0, 0.0]).tolist() == [0.5, 0.5]


def test_huge_scores_do_not_overflow_the_softmax():
    weights = weights_of(TopK(k=2, weighting="softmax"), [3e38, 1e38, 0.0])
    assert weights.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("k", [0, -1, 1.5, "2", None])
def test_top_k_has_to_be_a_positive_whole_number(k):
    with (
        types_unchecked(),
        pytest.raises(CompositionError, match=rf"top_k={k}\n  expected: a whole number of at least 1"),
    ):
        TopK(k=k)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan, math.inf])
def test_the_temperature_has_to_be_above_zero(temperature):
    with (
        types_unchecked(),
        pytest.raises(CompositionError, match=rf"temperature={temperature}\n  expected: a finite number above zero"),
    ):
        TopK(k=1, temperature=temperature)


def test_the_weighting_has_to_be_a_known_one():
    with (
        types_unchecked(),
        pytest.raises(CompositionError, match="weights='equal'\n  expected: 'uniform' or 'softmax'"),
    ):
        TopK(k=1, weighting="equal")


@pytest.mark.parametrize("select", [TopK(k=2), TopK(k=3, weighting="softmax", temperature=0.5), All()], ids=str)
def test_weights_are_those_of_a_library_of_the_allowed_alone(select):
    scores_TE = torch.rand(32, 5, generator=torch.Generator().manual_seed(0))
    allowed_TE = torch.tensor([[bool(n >> e & 1) for e in range(5)] for n in range(32)])
    weights_TE = select_among(select, scores_TE, allowed_TE)
    for token in range(32):
        which = allowed_TE[token].nonzero().squeeze(1)
        expected_E = torch.zeros(5)
        if len(which):
            expected_E[which] = select(scores_TE[token, which])
        torch.testing.assert_close(weights_TE[token], expected_E)
