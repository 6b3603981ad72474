"""The fast sums of outputs against the plain one: the same update, and nobody else's tensor overwritten."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from spectr.combine import merge_outputs
from spectr.layers.routed_linear import RoutedLinear
from spectr.ops.add_outputs import gathering_pays
from spectr.routers import Spectr, Uniform
from spectr.selection import All, TopK
from spectr.spectral import Share, Stack

INPUTS, OUTPUTS = 12, 10


def routed(ranks, top_k, weights="softmax", dtype=torch.float32, base=None):
    chance = torch.Generator().manual_seed(len(ranks) * 100 + top_k)
    parts = {
        f"e{i:02}": Share(
            torch.randn(r, INPUTS, generator=chance).to(dtype), torch.randn(OUTPUTS, r, generator=chance).to(dtype)
        )
        for i, r in enumerate(ranks)
    }
    base = nn.Linear(INPUTS, OUTPUTS, dtype=dtype) if base is None else base
    return RoutedLinear(base, Stack.of(parts), Spectr(top_k=top_k, weights=weights))


def expected(layer, x):
    decision = layer.route(x)
    return layer.base(x) + merge_outputs(decision.h_TP, decision.weights_TE, layer.B_OP, layer.owner_P)


@torch.no_grad()
def clearly_chosen(layer, x):
    """The tokens whose choice does not hang on rounding."""
    k = layer.select.k
    top = layer.route(x).scores_TE.sort(-1, descending=True).values
    if k >= top.shape[-1]:
        return torch.ones(top.shape[:-1], dtype=torch.bool)
    return top[..., k - 1] - top[..., k] > 0.02 * top[..., k - 1]


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 9)).map(lambda pair: [pair[1]] * pair[0]),
        st.lists(st.integers(1, 9), min_size=1, max_size=12),
    ),
    shape=st.lists(st.integers(1, 5), max_size=3),
    top_k=st.integers(1, 4),
    weights=st.sampled_from(["uniform", "softmax"]),
    grad=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_way_gives_the_plain_sum(ranks, shape, top_k, weights, grad, dtype):
    layer = routed(ranks, top_k, weights, dtype)
    x = torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)
    with contextlib.nullcontext() if grad else torch.inference_mode():
        found = layer(x)
        close_to = expected(layer, x)
    bound = 1e-5 if dtype == torch.float32 else 0.03
    if dtype == torch.bfloat16:  # where the next score is as large as the last one taken, either is right
        clear = clearly_chosen(layer, x)
        found, close_to = found[clear], close_to[clear]
        if not found.numel():
            return
    torch.testing.assert_close(found, close_to, rtol=bound, atol=bound * float(close_to.detach().abs().max()))


def test_gathering_is_for_few_of_many_of_one_rank():
    assert gathering_pays(TopK(k=4), 16, 8)
    assert not gathering_pays(TopK(k=4), 15, 8)
    assert not gathering_pays(TopK(k=4), 64, None)
    assert not gathering_pays(All(), 64, 8)
    assert routed([8] * 16, 4).rows_ER is not None
    assert RoutedLinear(nn.Linear(INPUTS, OUTPUTS), routed([8] * 16, 4).stack(), Uniform()).rows_ER is None


@pytest.mark.parametrize("ranks", [[4] * 3, [4] * 20, [1, 2, 3]], ids=["masked", "gathered", "unequal"])
def test_gradients_are_those_of_the_plain_sum(ranks):
    layer = routed(ranks, 2)
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(2), requires_grad=True)
    [fast] = torch.autograd.grad(layer(x).square().sum(), x)
    [slow] = torch.autograd.grad(expected(layer, x).square().sum(), x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_what_a_hook_of_the_base_layer_kept_stays_as_it_was():
    layer, kept = routed([4] * 3, 2), []
    layer.base.register_forward_hook(lambda _, __, out: kept.append(out))
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(3))
    layer(x)
    kept_before = torch.nn.functional.linear(x, layer.base.weight, layer.base.bias)
    assert torch.equal(kept[0], kept_before)


class Remembering(nn.Linear):
    """A base layer that gives out a tensor that it keeps."""

    kept: torch.Tensor

    def forward(self, input):
        """As a linear layer, and remember."""
        self.kept = super().forward(input)
        return self.kept


@torch.no_grad()
def test_the_output_of_another_kind_of_layer_is_not_overwritten():
    base = Remembering(INPUTS, OUTPUTS)
    layer = routed([4] * 3, 2, base=base)
    x = torch.randn(5, INPUTS, generator=torch.Generator().manual_seed(4))
    out = layer(x)
    assert torch.equal(base.kept, torch.nn.functional.linear(x, base.weight, base.bias))
    assert not torch.equal(out, base.kept)
