"""Alignment as small matrices: the same SVD."""

from __future__ import annotations

import torch
from hypothesis import assume, example, given, settings, strategies as st

from models import close
from spectr.spectral import align, rotate


@settings(max_examples=40, deadline=None)
@example(rank=6, inputs=6, outputs=6, scale=0.01, seed=49)  # nearly of rank 5
@given(
    rank=st.integers(1, 6),
    inputs=st.integers(6, 20),
    outputs=st.integers(6, 20),
    scale=st.sampled_from([0.01, 1.0, -2.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_svd_of_the_update(rank, inputs, outputs, scale, seed):
    chance = torch.Generator().manual_seed(seed)
    A = torch.randn(3, rank, inputs, generator=chance)
    B = torch.randn(3, outputs, rank, generator=chance)
    turned, holds = rotate(A, B, torch.full((3,), scale))
    well = (torch.linalg.cond(A) < 50) & (torch.linalg.cond(B) < 50)
    assert holds[well].all()
    assume(holds.any())
    A, B, turned = A[holds], B[holds], type(turned)(*(part[holds] for part in turned))
    found = turned.applied(A, B, torch.full((len(A),), scale))
    exact = scale * B.double() @ A.double()
    S = torch.linalg.svdvals(exact)[:, :rank]
    close(found.S.double(), S, 1e-5)
    close((found.U * found.S[:, None]).double() @ found.Vh.double(), exact, 1e-4)
    eye = torch.eye(rank, dtype=torch.float64).expand(len(A), -1, -1)
    close(found.Vh.double() @ found.Vh.double().mT, eye, 1e-4)
    close(found.U.double().mT @ found.U.double(), eye, 1e-4)
    assert (found.Vh.gather(-1, found.Vh.abs().argmax(-1, keepdim=True)) > 0).all()


def test_one_pair_is_aligned_like_a_batch():
    A, B = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)), torch.randn(7, 4)
    turned, holds = rotate(A, B, 0.5)
    assert bool(holds)
    for ours, theirs in zip(turned.applied(A, B, 0.5), align(A, B, 0.5), strict=True):
        close(ours, theirs, 1e-4)


def test_it_says_where_it_does_not_hold():
    A, B = torch.randn(4, 3, 9), torch.randn(4, 7, 3)
    A[1, 2] = A[1, 0]  # a repeated row
    B[2, :, 1] = 0
    A[3, 2] = A[3, 0] + 1e-6 * A[3, 1]
    assert rotate(A, B, 1.0)[1].tolist() == [True, False, False, False]
    assert not rotate(A[0], B[0], 0.0)[1]
    assert not rotate(torch.randn(5, 3), torch.randn(4, 5), 1.0)[1]  # more ranks than inputs
