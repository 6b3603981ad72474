"""Spectral alignment and stacks, against dense float64 decompositions and answers worked out by hand."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st

from models import random_factors
from spectr.spectral import Share, Stack, align, reference

EPS = torch.finfo(torch.float32).eps
SHAPES = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 24),
        "inputs": st.integers(1, 20),
        "outputs": st.integers(1, 20),
        "scale": st.sampled_from([1e-3, 0.5, 1.0, 2.0, 64.0]),
        "seed": st.integers(0, 10**6),
    }
)


def dense(A, B, scale):
    return scale * (B.double() @ A.double())


def identity_on(alive):
    return torch.diag(alive.double())


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_align_equals_the_dense_svd(case):
    A, B = random_factors(case["rank"], case["inputs"], case["outputs"], case["seed"])
    delta = dense(A, B, case["scale"])
    U, S, Vh = align(A, B, case["scale"])
    rank = min(case["rank"], case["inputs"], case["outputs"])
    assert (U.shape, S.shape, Vh.shape) == ((case["outputs"], rank), (rank,), (rank, case["inputs"]))
    assert {U.dtype, S.dtype, Vh.dtype} == {torch.float32}

    expected = torch.linalg.svdvals(delta)[:rank]
    largest = expected[0]
    torch.testing.assert_close(S.double(), expected, rtol=1e-5, atol=1e-6 * float(largest))
    torch.testing.assert_close((U * S).double() @ Vh.double(), delta, rtol=0, atol=4e-6 * float(largest))
    assert (S.diff() <= 0).all()


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_align_gives_orthonormal_directions_where_the_singular_value_is_not_zero(case):
    A, B = random_factors(case["rank"], case["inputs"], case["outputs"], case["seed"])
    U, S, Vh = align(A, B, case["scale"])
    alive = identity_on(S > 0)
    torch.testing.assert_close(U.double().T @ U.double(), alive, rtol=0, atol=40 * EPS)
    torch.testing.assert_close(Vh.double() @ Vh.double().T, alive, rtol=0, atol=40 * EPS)


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_align_makes_the_largest_entry_of_each_right_vector_positive(case):
    A, B = random_factors(case["rank"], case["inputs"], case["outputs"], case["seed"])
    _, S, Vh = align(A, B, case["scale"])
    for row, value in zip(Vh, S, strict=True):
        assert value == 0 or row[row.abs().argmax()] > 0


def test_align_does_not_depend_on_how_the_product_is_split_into_factors():
    A, B = random_factors(4, 12, 9, seed=3)
    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    for one, other in zip(align(A, B, 2.0), align(mix.T @ A * -3, B @ mix / -3, 2.0), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(align(A, B, 2.0).S[0]))


def test_align_matches_the_reference_vector_by_vector_signs_included():
    A, B = random_factors(4, 12, 9, seed=5)
    U, S, Vh = align(A, B, 0.25)
    for mine, theirs in zip((U, S, Vh), reference.dense_svd(dense(A, B, 0.25), rank=4), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("effective", [0, 1, 2, 3])
def test_null_directions_of_rank_deficient_factors_are_exactly_zero(effective):
    A, B = random_factors(5, 16, 12, seed=effective)
    B = B.clone()
    B[:, effective:] = B[:, :effective] @ torch.ones(effective, 5 - effective)
    U, S, Vh = align(A, B, 1.0)
    assert (S > 0).tolist() == [True] * effective + [False] * (5 - effective)
    assert not S[effective:].any()
    assert not U[:, effective:].any()
    assert not Vh[effective:].any()
    torch.testing.assert_close((U * S).double() @ Vh.double(), dense(A, B, 1.0), rtol=0, atol=1e-5)


def test_the_scale_lives_in_the_singular_values_alone():
    A, B = random_factors(3, 10, 8, seed=1)
    plain, scaled = align(A, B, 1.0), align(A, B, 8.0)
    torch.testing.assert_close(scaled.S, 8 * plain.S, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.U, plain.U, rtol=0, atol=1e-6)
    torch.testing.assert_close(scaled.Vh, plain.Vh, rtol=0, atol=1e-6)


def test_a_negative_scale_turns_the_left_vectors():
    A, B = random_factors(3, 10, 8, seed=1)
    plain, turned = align(A, B, 1.0), align(A, B, -1.0)
    assert (turned.S > 0).all()
    torch.testing.assert_close(turned.Vh, plain.Vh, rtol=0, atol=1e-6)
    torch.testing.assert_close(turned.U, -plain.U, rtol=0, atol=1e-6)


def batch_and_members(rank, inputs, outputs, count):
    pairs = [random_factors(rank, inputs, outputs, seed) for seed in range(count)]
    scales = torch.tensor([0.5 + n for n in range(count)])
    batch = align(torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs]), scales)
    for n, (A, B) in enumerate(pairs):
        alone = align(A[None], B[None], scales[n : n + 1])
        yield from ((together[n], single[0]) for together, single in zip(batch, alone, strict=True))


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(4, 32, 16), (8, 16, 48), (16, 64, 64), (16, 8, 8)])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_batch_equals_its_members_bit_for_bit(rank, inputs, outputs, count):
    assert all(torch.equal(one, other) for one, other in batch_and_members(rank, inputs, outputs, count))


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(5, 7, 3), (3, 16, 33), (7, 100, 8)])
def test_a_batch_of_odd_sizes_equals_its_members_to_rounding(rank, inputs, outputs):
    for one, other in batch_and_members(rank, inputs, outputs, 7):  # the members start on unaligned memory
        torch.testing.assert_close(one, other, rtol=0, atol=4e-6 * max(1, float(other.abs().max())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    A, B = random_factors(4, 12, 9, seed=2)
    A, B = A.to(dtype), B.to(dtype)
    for given_dtype, float32 in zip(align(A, B, 2.0), align(A.float(), B.float(), 2.0), strict=True):
        assert given_dtype.dtype == torch.float32
        assert torch.equal(given_dtype, float32)


def test_align_of_a_matrix_known_by_heart():
    U, S, Vh = align(torch.tensor([[0.0, -3.0]]), torch.tensor([[4.0], [0.0], [0.0]]), 0.5)
    torch.testing.assert_close(S, torch.tensor([6.0]))
    torch.testing.assert_close(Vh, torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(U, torch.tensor([[-1.0], [0.0], [0.0]]))


# The oracle itself, on numbers worked out by hand.
DELTA = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
X = torch.tensor([1.0, 7.0, -2.0], dtype=torch.float64)


def test_reference_scores_of_a_matrix_known_by_heart():
    assert reference.spectral_score(DELTA, X, 2) == pytest.approx((3**2 + 8**2) ** 0.5)
    assert reference.spectral_score(DELTA, X, 2) == pytest.approx(float((DELTA @ X).norm()))
    assert reference.projection_score(DELTA, X, 2) == pytest.approx(5**0.5)
    assert reference.arrow_score(DELTA, X) == pytest.approx(2.0)


def test_reference_weights_of_scores_known_by_heart():
    scores = [1.0, 4.0, 2.0, 3.0]
    assert reference.top_k(scores, 2) == [1, 3]
    assert reference.uniform_weights(scores, 2) == [0, 0.5, 0, 0.5]
    sure = 1 / (1 + torch.tensor(-2.0, dtype=torch.float64).exp().item())
    assert reference.softmax_weights(scores, 2, temperature=0.5) == pytest.approx([0, sure, 0, 1 - sure])


def test_reference_merges_of_matrices_known_by_heart():
    weights = [0.5, 0.5]
    other = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert reference.merge_outputs([DELTA, other], weights, X).tolist() == [5.0, -4.0]
    A = [torch.tensor([[1.0, 0, 0]]).double(), torch.tensor([[0, 1.0, 0]]).double()]
    B = [torch.tensor([[2.0], [0]]).double(), torch.tensor([[0], [4.0]]).double()]
    # (B1 + B2) / 2 = (1, 2), (A1 + A2) x / 2 = 4
    assert reference.merge_factors(A, B, weights, X).tolist() == [4.0, 8.0]


class Own(NamedTuple):
    """A router's own tensors."""

    prototypes_EI: torch.Tensor
    centers_P: torch.Tensor


def stack_of(ranks):
    parts = {}
    for seed, (name, rank) in enumerate(ranks.items()):
        A, B = random_factors(rank, 6, 5, seed)
        parts[name] = Share(A, B, Own(A[:1], A[:, 1].clone()))
    return parts, Stack.of(parts)


def test_a_stack_holds_its_experts_in_alphabetical_order_one_after_the_other():
    parts, stack = stack_of({"zoo": 2, "ant": 3, "bee": 1})
    assert stack.experts == ("ant", "bee", "zoo")
    assert stack.ranks == (3, 1, 2)
    assert stack.owner_P.tolist() == [0, 0, 0, 1, 2, 2]
    assert stack.common_rank is None
    assert torch.equal(stack.A_PI, torch.cat([parts["ant"].A, parts["bee"].A, parts["zoo"].A]))
    assert torch.equal(stack.B_OP, torch.cat([parts["ant"].B, parts["bee"].B, parts["zoo"].B], dim=1))
    assert torch.equal(stack.own.prototypes_EI[2:], parts["zoo"].own.prototypes_EI)
    assert torch.equal(stack.own.centers_P, torch.cat([parts[name].own.centers_P for name in ("ant", "bee", "zoo")]))


def test_parts_of_a_stack_are_what_it_was_made_of():
    parts, stack = stack_of({"zoo": 2, "ant": 2})
    assert stack.common_rank == 2
    assert set(stack.parts()) == set(parts)
    for name, part in stack.parts().items():
        for mine, given_part in zip(
            (part.A, part.B, *part.own), (parts[name].A, parts[name].B, *parts[name].own), strict=True
        ):
            assert torch.equal(mine, given_part)
        assert type(part.own) is Own
