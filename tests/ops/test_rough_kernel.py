"""Few tokens of many experts: half of ``A`` is read, then the experts that may be among the best. No result changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from compiled import needs_a_compiler
from holding import holding
from spectr import Calibrated, Spectr
from spectr.layers import RoutedLinear
from spectr.ops.screening import Rough
from spectr.routers.calibrated import Centers
from spectr.spectral import Share, Stack

INPUTS, OUTPUTS = 70, 20


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(factors, top_k=2, router=None, centers=None):
    """A layer of these experts, each a row of (E, R, I)."""
    parts = {
        f"e{number:03}": Share(
            A, numbers(OUTPUTS, len(A), seed=number), () if centers is None else Centers(centers[number])
        )
        for number, A in enumerate(factors)
    }
    base = nn.Linear(factors.shape[-1], OUTPUTS, bias=False)
    router = router or Spectr(top_k=top_k, weights="softmax")
    return RoutedLinear(base, Stack.of(parts), router, use=router.policy and router.policy.use)


@torch.no_grad()
def both(layer, x, prior=None):
    """The layer's output as it comes, which has to be by a rough `A`, and with that taken away."""
    whole = layer.factors.plan.linear
    assert whole.layer.rough, "all of A is read"
    with holding(layer, prior=prior):
        roughly = layer(x)
        whole.rough = whole.layer.rough = None
        exactly = layer(x)
    layer.prepare()
    return roughly, exactly


def same(layer, x, prior=None):
    roughly, exactly = both(layer, x, prior)
    torch.testing.assert_close(roughly, exactly, rtol=0, atol=0, equal_nan=True)


@needs_a_compiler
@settings(max_examples=150, deadline=None)
@given(
    experts=st.integers(16, 80),
    rank=st.integers(1, 9),
    top_k=st.integers(1, 2),
    inputs=st.sampled_from([5, 37, 70, 128]),
    tokens=st.sampled_from([(1,), (1, 1), (2, 1), (4,)]),
    spread=st.sampled_from([0.0, 1e-6, 1e-4, 1e-2, 1.0, 10.0]),
    size=st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e25]),
    seed=st.integers(0, 10_000),
)
def test_the_same_is_chosen(experts, rank, top_k, inputs, tokens, spread, size, seed):
    """However near the experts are to each other, and however large the numbers."""
    factors = numbers(1, rank, inputs, seed=seed) + spread * numbers(experts, rank, inputs, seed=seed + 1)
    same(layer_of(factors, top_k), size * numbers(*tokens, inputs, seed=seed + 2))


@needs_a_compiler
@pytest.mark.parametrize("rows", [1, 2])
def test_with_centers_and_a_prior(rows):
    router = Calibrated(level="prior", top_k=2, weights="softmax")
    layer = layer_of(numbers(40, 4, INPUTS, seed=0), router=router, centers=numbers(40, 4, seed=1))
    same(layer, numbers(2, 1, INPUTS, seed=3), numbers(rows, 40, seed=2).abs() * torch.linspace(0, 3, 40))


@needs_a_compiler
def test_what_bfloat16_cannot_distinguish_is_distinguished():
    """The best expert, wherever it is, is larger than the others by less than its rounded factors show."""
    one = numbers(1, 4, INPUTS, seed=0)
    x = numbers(1, INPUTS, seed=1)
    for best in range(0, 24, 5):
        factors = one.repeat(24, 1, 1)
        factors[best] *= 1 + 1e-5
        assert Rough.of(factors.flatten(0, 1), 24).A_PI.unflatten(0, (24, -1)).unique(dim=0).shape[0] <= 2
        layer = layer_of(factors, top_k=1)
        roughly, exactly = both(layer, x)
        expected = layer.base(x) + x @ factors[best].mT @ layer.B_OP.mT[4 * best : 4 * best + 4]
        torch.testing.assert_close(roughly, expected)
        torch.testing.assert_close(roughly, exactly, rtol=0, atol=0)


@needs_a_compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("where", ["token", "expert", "first expert"])
def test_numbers_that_are_none(bad, where):
    factors, x = numbers(40, 4, INPUTS, seed=0), numbers(2, INPUTS, seed=1)
    (x[0] if where == "token" else factors[0 if where == "first expert" else 30, 2])[7] = bad
    roughly, exactly = both(layer_of(factors), x)
    torch.testing.assert_close(roughly.isfinite(), exactly.isfinite())
    torch.testing.assert_close(roughly.nan_to_num(), exactly.nan_to_num(), rtol=0, atol=0)


@needs_a_compiler
@torch.no_grad()
def test_factors_changed_in_place_are_read_anew():
    layer, x = layer_of(numbers(40, 4, INPUTS, seed=0)), numbers(1, INPUTS, seed=1)
    before = layer(x)
    layer.A_PI.copy_(numbers(160, INPUTS, seed=2))
    after = layer(x)
    assert not torch.allclose(before, after)
    assert layer.factors.plan.linear.rough is None, "nothing is prepared in a call"
    layer.prepare()
    same(layer, x)
    torch.testing.assert_close(after, layer(x))


@needs_a_compiler
def test_more_tokens_and_few_experts_read_all():
    few = layer_of(numbers(15, 4, INPUTS, seed=0))
    with torch.no_grad():
        few(numbers(1, INPUTS, seed=1))
    assert few.factors.plan.linear.rough is None, "half of A and four experts' are as much as all"


def test_the_bound_holds_and_is_near():
    """Of scores in float64: never beyond it, and not so far below that every expert would be near."""
    factors = numbers(64, 8, 576, seed=0) * torch.logspace(-3, 3, 64)[:, None, None]
    rough = Rough.of(factors.flatten(0, 1), 64)
    x = numbers(200, 576, seed=1).double()
    scores, roughly = (
        torch.einsum("ti,eri->ter", x, A.double()).norm(dim=-1) for A in (factors, rough.A_PI.view_as(factors))
    )
    bound = rough.errors_E.double() * x.norm(dim=-1, keepdim=True)
    off = (scores - roughly).abs() / bound
    assert 0.02 < off.max() < 1
    assert (bound / scores).median() < 0.03


def test_a_tensor_that_tells_no_change_is_left_alone():
    with torch.inference_mode():
        A = numbers(64, 8, seed=0)
    assert Rough.of(A, 16) is None
    assert Rough.of(numbers(64, 8, seed=0), 16) is not None


def in_float64(layer, x, top_k):
    """The layer's output, and for which tokens float32 cannot take another expert for one of the best."""
    A, B, x = layer.A_PI.double(), layer.B_OP.double(), x.double()
    h = (x @ A.mT).unflatten(-1, (len(layer.experts), -1))
    scores = h.norm(dim=-1)
    best = scores.topk(top_k + 1, dim=-1)
    weights = torch.zeros_like(scores).scatter(-1, best.indices[..., :-1], best.values[..., :-1].softmax(-1))
    clear = best.values[..., -2] - best.values[..., -1] > 1e-5 * best.values[..., 0]
    return layer.base.double()(x) + (h * weights[..., None]).flatten(-2) @ B.mT, clear


@needs_a_compiler
@settings(max_examples=100, deadline=None)
@given(
    experts=st.integers(16, 80),
    rank=st.integers(1, 9),
    top_k=st.integers(1, 2),
    inputs=st.sampled_from([5, 37, 70, 128, 600]),
    tokens=st.sampled_from([(17,), (33,), (2, 50), (300,)]),
    spread=st.sampled_from([1e-3, 1e-2, 1.0]),
    precision=st.sampled_from(["highest", "high"]),
    seed=st.integers(0, 10_000),
)
@torch.no_grad()
def test_many_tokens_choose_the_same(experts, rank, top_k, inputs, tokens, spread, precision, seed):
    factors = numbers(1, rank, inputs, seed=seed) + spread * numbers(experts, rank, inputs, seed=seed + 1)
    layer, x = layer_of(factors / inputs**0.5, top_k), numbers(*tokens, inputs, seed=seed + 2)
    torch.set_float32_matmul_precision(precision)
    try:
        found = layer(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert layer.factors.plan.linear.layer.rough
    expected, clear = in_float64(layer, x, top_k)
    assert clear.any()
    near = 1e-5 if precision == "highest" else 2e-4
    size = expected.abs().max().item()
    torch.testing.assert_close(found[clear].double() / size, expected[clear] / size, rtol=0, atol=near)


@needs_a_compiler
@torch.no_grad()
def test_of_many_tokens_the_first_of_equals_is_taken():
    layer = layer_of(numbers(1, 4, INPUTS, seed=0).repeat(40, 1, 1))
    x = numbers(90, INPUTS, seed=1)
    shared = x @ layer.A_PI[:4].mT
    expected = layer.base(x) + (shared @ layer.B_OP.mT[:4] + shared @ layer.B_OP.mT[4:8]) / 2
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


@needs_a_compiler
@pytest.mark.parametrize("rows", [1, 2])
def test_many_tokens_with_centers_and_a_prior(rows):
    router = Calibrated(level="prior", top_k=2, weights="softmax")
    layer = layer_of(0.1 * numbers(40, 4, INPUTS, seed=0), router=router, centers=0.1 * numbers(40, 4, seed=1))
    prior = numbers(rows, 40, seed=2).abs() * torch.linspace(0, 3, 40)
    roughly, exactly = both(layer, numbers(2, 140, INPUTS, seed=3), prior)
    torch.testing.assert_close(roughly, exactly, rtol=1e-5, atol=1e-4)


@needs_a_compiler
@torch.no_grad()
def test_of_many_tokens_an_expert_without_numbers_is_nobodys():
    """As of few: it is no larger than who comes before it."""
    factors = numbers(40, 4, INPUTS, seed=0)
    factors[30, 2, 7] = torch.nan
    assert layer_of(factors)(numbers(90, INPUTS, seed=1)).isfinite().all()


@needs_a_compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3.4e38])
@torch.no_grad()
def test_a_number_that_is_none_is_its_own_tokens_alone(bad):
    layer, x = layer_of(numbers(40, 4, INPUTS, seed=0)), numbers(90, INPUTS, seed=1)
    before = layer(x)
    x[20, 7] = bad
    after = layer(x)
    others = torch.arange(90) != 20
    torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)
    assert not torch.equal(after[20], before[20])


@needs_a_compiler
@torch.no_grad()
def test_what_bfloat16_leaves_out_of_many_tokens_is_seen():
    """An expert is the best of a token, and another of its nearest bfloat16."""
    factors, x = torch.zeros(40, 1, 64), torch.zeros(20, 64)
    factors[:, 0, 0] = 1 / 64
    factors[3, 0, 16:32], factors[30, 0, 32:48] = 1, 1
    x[:, 16:24], x[:, 24:32], x[:, 32:48] = 1.0040, 1.0030, 1.0038  # 1 + 1/128, 1 and 1
    layer = layer_of(factors, top_k=1)
    expected = layer.base(x) + (x @ factors[30].mT) @ layer.B_OP.mT[30:31]
    torch.testing.assert_close(layer(x), expected)
