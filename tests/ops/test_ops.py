"""The operations: every backend computes what the reference does, graphs show them, and plans say why they are used."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from compiled import needs_a_compiler
from models import peft_library, tiny_llama, tokens, types_unchecked
from spectr import Arrow, Calibrated, Lag, Seqr, SeqrNormalised, Spectr, Uniform, compose, ops
from spectr.layers import RoutedLinear
from spectr.layers.batch_routing import LayerCall
from spectr.layers.expert_factors import Factors
from spectr.ops import dispatch, reference_ops, registered
from spectr.ops.add_outputs import gathered_sum
from spectr.ops.grouped import grouped_inputs, grouped_outputs
from spectr.routers.arrow import Prototypes
from spectr.routers.calibrated import Centers
from spectr.routers.seqr_normalised import Norms
from spectr.spectral import Share, Stack

INPUTS, OUTPUTS = 24, 20
OPERATION = torch.ops.spectr


class Case(NamedTuple):
    """The arguments of an operation."""

    out: torch.Tensor
    x: torch.Tensor
    A: torch.Tensor
    Bt: torch.Tensor
    centers: torch.Tensor | None
    rows: torch.Tensor | None
    select: ops.Selector | None

    @property
    def numbers(self):
        return self.select or (0, 0, 0.0, "")

    @property
    def h(self):
        return self.x @ self.A.mT


def case(seed=0, experts=5, rank=4, k=2, temperature=0.0, tokens=6, centers=True, rows=2, fixed=False):
    chance = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=chance)

    width = experts * rank if fixed else experts
    return Case(
        numbers(tokens, OUTPUTS),
        numbers(tokens, INPUTS),
        numbers(experts * rank, INPUTS),
        numbers(experts * rank, OUTPUTS),
        numbers(experts * rank) if centers and not fixed else None,
        numbers(rows, width).abs() if rows else None,
        None if fixed else ops.Selector(experts, min(k, experts), temperature),
    )


@contextmanager
def by(backend):
    """The registered operations by a backend: "kernels", or "torch"."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "torch":
            patch.setattr(registered, "backend_for", lambda device: ops.Offer(None, "none"))
        else:
            assert ops.backend_for("cpu").backend
        yield


backends = pytest.mark.parametrize("backend", ["torch", pytest.param("kernels", marks=needs_a_compiler)])
cases = st.builds(
    case,
    seed=st.integers(0, 10_000),
    experts=st.integers(1, 20),
    rank=st.integers(1, 9),
    k=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 2.0]),
    tokens=st.sampled_from([2, 6, 18, 40]),
    centers=st.booleans(),
    rows=st.sampled_from([0, 1, 2]),
)


@backends
@settings(max_examples=60, deadline=None)
@given(given=cases)
def test_each_backend_computes_the_reference(backend, given):
    with by(backend), torch.no_grad():
        weighted = ops.choose(given.h, given.centers, given.rows, *given.numbers)
        added = ops.add_update(*given[:6], *given.numbers)
        in_place = given.out.clone()
        ops.add_update_(in_place, *given[1:6], *given.numbers)
    torch.testing.assert_close(weighted, reference_ops.choose(given.h, given.centers, given.rows, given.select))
    torch.testing.assert_close(added, reference_ops.add_update(*given), rtol=1e-4, atol=1e-4)
    assert torch.equal(added, in_place)


@backends
@pytest.mark.parametrize("tokens", [2, 40])
def test_fixed_weights_are_those_of_the_reference(backend, tokens):
    fixed = case(tokens=tokens, fixed=True)
    with by(backend), torch.no_grad():
        added = ops.add_update(*fixed[:6], *fixed.numbers)
    torch.testing.assert_close(added, reference_ops.add_update(*fixed), rtol=1e-4, atol=1e-4)


@backends
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("experts", [3, 9, 64])
def test_of_equal_experts_the_first_are_taken(backend, tokens, experts):
    one = case(experts=1, tokens=tokens, centers=False, rows=0)
    tied = one._replace(A=one.A.repeat(experts, 1), select=ops.Selector(experts, 2, 0.0))
    with by(backend), torch.no_grad():
        weighted = ops.choose(tied.h[:, :4].repeat(1, experts), None, None, *tied.numbers)
    taken = weighted.unflatten(-1, (experts, -1)).ne(0).any(-1)
    assert taken.sum(0).tolist() == [tokens, tokens] + [0] * (experts - 2)


@backends
@pytest.mark.parametrize("fixed", [False, True])
def test_the_operations_are_what_torch_asks_of_operations(backend, fixed):
    plain = case(fixed=fixed)
    needs = [None if tensor is None else tensor.clone().requires_grad_() for tensor in plain[:6]]
    with by(backend), types_unchecked():  # sizes are symbols there
        torch.library.opcheck(OPERATION.add_update.default, (*plain[:6], *plain.numbers))
        torch.library.opcheck(OPERATION.add_update.default, (*needs, *plain.numbers))
        torch.library.opcheck(OPERATION.add_update_.default, (*plain[:6], *plain.numbers))
        if not fixed:
            torch.library.opcheck(OPERATION.choose.default, (plain.h, plain.centers, plain.rows, *plain.numbers))


@backends
@pytest.mark.parametrize("fixed", [False, True])
def test_gradients_are_those_of_torch(backend, fixed):
    given = case(fixed=fixed, temperature=1.5)
    needs = [None if tensor is None else tensor.clone().requires_grad_() for tensor in given[:6]]
    wanted = [tensor for tensor in needs if tensor is not None]
    slow = torch.autograd.grad(registered.add_update_by_torch(*needs, given.select).square().sum(), wanted)
    with by(backend):
        fast = torch.autograd.grad(OPERATION.add_update(*needs, *given.numbers).square().sum(), wanted)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# Graphs


class Graphs:
    """A backend of ``torch.compile`` that keeps what it is given."""

    def __init__(self):
        self.targets = []

    def __call__(self, graph, inputs):
        self.targets += [node.target for node in graph.graph.nodes if node.op == "call_function"]
        return graph.forward


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    ranks = {"ants": 4, "bees": 4, "cats": 4}
    return peft_library(tiny_llama(num_hidden_layers=1), tmp_path_factory.mktemp("experts"), ranks)


@pytest.fixture
def graphs():
    with types_unchecked():
        torch._dynamo.reset()
        yield Graphs()
        torch._dynamo.reset()


def composed(experts, router):
    model = tiny_llama(num_hidden_layers=1)
    return model, compose(model, experts, router)


ids = tokens(2, 6, seed=1)


@needs_a_compiler
@torch.no_grad()
@pytest.mark.parametrize("weights", ["uniform", "softmax"])
def test_a_compiled_model_has_the_operation_once_for_each_layer(experts, graphs, weights):
    model, routed = composed(experts, Spectr(top_k=2, weights=weights))
    fast = torch.compile(model, fullgraph=True, backend=graphs)
    torch.testing.assert_close(fast(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert graphs.targets.count(OPERATION.add_update_) == len(routed.layers)


@torch.no_grad()
@pytest.mark.parametrize("router", [Arrow(top_k=2), Uniform()], ids=lambda router: type(router).__name__)
def test_rules_without_a_kernel_are_traced(experts, graphs, router):
    model, _ = composed(experts, router)
    torch.compile(model, fullgraph=True, backend=graphs)(ids)
    assert not [target for target in graphs.targets if "spectr" in str(target)]


@needs_a_compiler
def test_a_graph_that_needs_gradients_is_torchs(experts, graphs):
    model, _ = composed(experts, Spectr(top_k=2))
    torch.compile(model, fullgraph=True, backend=graphs)(ids).logits.sum().backward()
    assert not [target for target in graphs.targets if "spectr" in str(target)]


class OtherLinear(nn.Linear):
    """A base layer that may keep what it gives out."""


@needs_a_compiler
@torch.no_grad()
def test_the_output_of_another_kind_of_layer_gets_the_functional_form(graphs):
    layer = layer_of(Spectr(top_k=2), base=OtherLinear(INPUTS, OUTPUTS))
    x = torch.randn(3, INPUTS)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=graphs)(x), layer(x))
    assert graphs.targets.count(OPERATION.add_update) == 1
    assert OPERATION.add_update_ not in graphs.targets


@needs_a_compiler
@torch.no_grad()
def test_ahead_of_time_graphs_compute_the_same(graphs):
    layer = layer_of(Spectr(top_k=2))
    x = torch.randn(3, INPUTS)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


# Plans

OWN = dict.fromkeys((Spectr, Seqr, Uniform), lambda *_: ())
OWN |= {Arrow: lambda row, _: Prototypes(row), Lag: lambda row, _: Prototypes(row), Calibrated: lambda _, c: Centers(c)}
OWN |= {SeqrNormalised: lambda *_: Norms(torch.zeros(1), torch.ones(1))}


def layer_of(router, ranks=(4, 4, 4), base=None, dtype=torch.float32):
    chance = torch.Generator().manual_seed(0)
    parts = {
        f"e{number}": Share(
            torch.randn(rank, INPUTS, generator=chance),
            torch.randn(OUTPUTS, rank, generator=chance),
            OWN[type(router)](torch.randn(1, INPUTS, generator=chance), torch.randn(rank, generator=chance)),
        ).to(torch.device("cpu"), dtype)
        for number, rank in enumerate(ranks)
    }
    return RoutedLinear(base or nn.Linear(INPUTS, OUTPUTS, dtype=dtype), Stack.of(parts), router)


REASONS = [
    (layer_of(Spectr(top_k=2)), "C for cpu: top 2 of 3 by lengths, with the base layer"),
    (layer_of(Calibrated(level="token"), base=OtherLinear(INPUTS, OUTPUTS)), "C for cpu: top 1 of 3 by lengths, after"),
    (layer_of(Spectr(combine="ties")), "no kernel supports combine='ties'"),
    (layer_of(Arrow(top_k=2)), "Arrow has no kernel for its scores"),
    (layer_of(Lag(top_k=1)), "Lag has no kernel for its scores"),
    (layer_of(Uniform()), "Uniform has no kernel for its scores"),
    (layer_of(SeqrNormalised()), "SeqrNormalised has no kernel for its scores"),
    (layer_of(Seqr(), ranks=(4, 3)), "the experts' ranks differ"),
    (layer_of(Spectr(top_k=2), dtype=torch.float64), "no kernel for these tensors (float64, cpu)"),
]


@needs_a_compiler
@pytest.mark.parametrize(("layer", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_a_plan_says_why(layer, reason):
    layer.prepare()
    plan = layer.factors.plan
    assert plan.reason.startswith(reason)
    assert (plan.backend is None) == (not reason.startswith("C for"))


@needs_a_compiler
def test_a_plan_is_made_again_for_another_dtype():
    layer = layer_of(Spectr(top_k=2))
    assert layer.double().factors.plan.backend is None
    assert layer.bfloat16().factors.plan.backend is not None
    assert layer.factors.plan.Bt_PO.dtype == torch.bfloat16


def test_a_call_without_a_plan_is_torchs_and_reported_once(caplog, monkeypatch):
    layer, x = layer_of(Spectr(top_k=2)), torch.randn(2, INPUTS)
    ops.report_once.cache_clear()
    monkeypatch.setattr(dispatch, "make_kernel_plan", lambda *_, **__: pytest.fail("prepared in a call"))
    held = layer.factors._replace(plan=None)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = layer._update(layer.base(x), x, LayerCall(held, held))
    torch.testing.assert_close(out, layer(x))
    assert [record.message for record in caplog.records] == [ops.NOT_PREPARED]


def test_a_plan_for_choosing_serves_no_fixed_weights():
    layer, x = layer_of(Spectr(top_k=2)), torch.randn(2, INPUTS)
    with torch.no_grad():
        from spectr.layers.batch_routing import BatchRouting, routed_by

        weights = torch.tensor([[[0.2, 0.3, 0.5]]])
        with routed_by(BatchRouting(layer.experts, weights)):
            found = layer(x)
        with routed_by(BatchRouting(layer.experts, weights, factors={layer: layer.subset(layer.experts)})):
            expected = layer(x)
    torch.testing.assert_close(found, expected)


def test_factors_have_no_plan_until_they_are_given_one():
    layer = layer_of(Spectr(top_k=2))
    assert Factors.of(layer.stack(), layer.router).plan is None
    assert layer.factors_of(layer.stack()).plan is not None


def test_no_tokens_are_no_error():
    """As modules of MoE experts get them that no token chose."""
    none, A, B = torch.zeros(0, 4), torch.randn(6, 4), torch.randn(5, 6)
    h = grouped_inputs(none, A, (3, 3), torch.zeros(0, 2, dtype=torch.bool))
    assert h.shape == (0, 6)
    assert grouped_outputs(h, torch.zeros(0, 2), B, (3, 3)).shape == (0, 5)
    rows, index = torch.arange(6).view(2, 3), torch.zeros(0, 1, dtype=torch.long)
    assert gathered_sum(h, index, torch.zeros(0, 1), B, rows).shape == (0, 5)
