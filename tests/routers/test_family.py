"""LAG, SEQR, and TIES and DARE inside the routing, against slow references and against plain SpectR."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from holding import holding
from models import close, dense_deltas, logits, peft_library, random_factors, tiny_llama, tokens, write_adapter
from one_layer import EQUAL, EXPERTS, INPUTS, OUTPUTS, UNEQUAL, one_layer_library, plain_layer, some_tokens
from spectr import Arrow, ExpertLibrary, Lag, Seqr, Spectr, compose, trace
from spectr.errors import CompositionError
from spectr.spectral import reference
from spectr.spectral.sparsify import drop


def deltas_of(root, names):
    return [dense_deltas(root / "experts" / name)["layer"] for name in names]


@pytest.mark.parametrize("ranks", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    "router", [Lag(shortlist=1), Lag(shortlist=3, top_k=2), Lag(top_k=3, weights="softmax")], ids=str
)
def test_lag_equals_the_reference_token_by_token(tmp_path, router, ranks):
    model, x_TI = plain_layer(), some_tokens()
    base = model.layer
    compose(model, one_layer_library(tmp_path / "experts", ranks), router)
    deltas = deltas_of(tmp_path, ranks)
    decision, out_TO = model.layer.route(x_TI), model(x_TI)
    sizes = [min(rank, OUTPUTS, INPUTS) for rank in ranks.values()]
    for t, x in enumerate(x_TI.double()):
        scores = reference.shortlisted(deltas, x, router.shortlist, sizes)
        weigh = reference.softmax_weights if router.weights == "softmax" else reference.uniform_weights
        weights = weigh(scores, router.top_k, *([1.0] if router.weights == "softmax" else []))
        expected = base.weight.double() @ x + base.bias.double() + reference.merge_outputs(deltas, weights, x)
        torch.testing.assert_close(decision.scores_TE[t].double(), torch.tensor(scores).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decision.weights_TE[t].double(), torch.tensor(weights).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(out_TO[t].double(), expected, rtol=0, atol=2e-5)


def test_a_shortlist_of_all_is_spectr_and_one_is_arrow(tmp_path):
    library, x_TI = one_layer_library(tmp_path / "experts", EQUAL), some_tokens()
    found = {}
    for name, router in {
        "all": Lag(shortlist=EXPERTS, top_k=2),
        "spectr": Spectr(top_k=2),
        "one": Lag(shortlist=1),
        "arrow": Arrow(top_k=1),
    }.items():
        model = plain_layer()
        compose(model, library, router)
        found[name] = model(x_TI)
    close(found["all"], found["spectr"])
    close(found["one"], found["arrow"])


def test_lag_computes_the_shortlisted_alone(tmp_path):
    model, x_TI = plain_layer(), some_tokens()
    compose(model, one_layer_library(tmp_path / "experts", EQUAL), Lag(shortlist=2, top_k=1))
    with FlopCounterMode(display=False) as counter:
        model(x_TI)
    tokens_, rank = len(x_TI), 4
    base, prototypes = 2 * tokens_ * INPUTS * OUTPUTS, 2 * tokens_ * EXPERTS * INPUTS
    chosen = 2 * tokens_ * (2 * rank * INPUTS + 1 * rank * OUTPUTS)
    assert counter.get_total_flops() == base + prototypes + chosen


def shared_library(root, names=tuple("abcde"), strangers=()):
    """Experts with one A at each module; strangers have another one."""
    shared, _ = random_factors(4, INPUTS, OUTPUTS, 99)
    for seed, name in enumerate(names):
        A, B = random_factors(4, INPUTS, OUTPUTS, seed)
        write_adapter(root / name, {"layer": (A if name in strangers else shared, B)}, alpha=6.0)
    return ExpertLibrary.open(root)


def test_seqr_is_spectr_where_experts_share_their_input_factor(tmp_path):
    library, x_TI = shared_library(tmp_path / "experts"), some_tokens()
    model, plain = plain_layer(), plain_layer()
    compose(model, library, Seqr(top_k=3))
    compose(plain, library, Spectr(top_k=3))
    assert model.layer.mix_PR.shape == (5 * 4, 4)
    assert model.layer.A_PI.shape == (4, INPUTS)
    ours, theirs = model.layer.route(x_TI), plain.layer.route(x_TI)
    torch.testing.assert_close(ours.scores_TE, theirs.scores_TE, rtol=1e-5, atol=1e-5)
    close(model(x_TI), plain(x_TI))
    for t, x in enumerate(x_TI.double()):
        scores = [reference.spectral_score(delta, x, 4) for delta in deltas_of(tmp_path, library)]
        torch.testing.assert_close(ours.scores_TE[t].double(), torch.tensor(scores).double(), rtol=1e-5, atol=1e-5)


def test_seqr_costs_the_rank_squared_for_each_expert(tmp_path):
    model, x_TI = plain_layer(), some_tokens()
    compose(model, shared_library(tmp_path / "experts"), Seqr())
    with FlopCounterMode(display=False) as counter:
        model.layer.route(x_TI)
    assert counter.get_total_flops() == 2 * len(x_TI) * (4 * INPUTS + 5 * 4 * 4)


def test_seqr_falls_back_where_some_expert_has_another_input_factor(tmp_path):
    library, x_TI = shared_library(tmp_path / "experts", strangers="c"), some_tokens()
    model, plain, few = plain_layer(), plain_layer(), plain_layer()
    routed = compose(model, library, Seqr(top_k=2))
    compose(plain, library, Spectr(top_k=2))
    assert model.layer.mix_PR is None
    assert torch.equal(model(x_TI), plain(x_TI))
    routed.allow(["a", "b", "d"])  # now they share
    assert model.layer.mix_PR is not None
    compose(few, library.without("c").without("e"), Seqr(top_k=2))
    assert torch.equal(model(x_TI), few(x_TI))
    routed.allow(None)
    assert torch.equal(model(x_TI), plain(x_TI))


def test_seqr_holds_a_decision(tmp_path):
    model, x_TI = plain_layer(), some_tokens()
    compose(model, shared_library(tmp_path / "experts"), Seqr(top_k=1))
    weights = torch.zeros(1, 5)
    weights[0, 2] = 1
    base = model.layer.base
    delta = deltas_of(tmp_path, "c")[0].float()
    with holding(model.layer, weights=weights):
        close(model(x_TI[None])[0], base(x_TI) + x_TI @ delta.T, 1e-4)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("ranks", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("weights", ["uniform", "softmax"])
def test_ties_inside_the_routing_equals_the_reference(tmp_path, density, ranks, weights):
    model, x_TI = plain_layer(), some_tokens()
    base = model.layer
    router = Spectr(top_k=3, combine=f"ties:density={density}", weights=weights)
    compose(model, one_layer_library(tmp_path / "experts", ranks), router)
    deltas, out_TO = deltas_of(tmp_path, ranks), model(x_TI)
    for t, x in enumerate(x_TI.double()):
        scores = [reference.spectral_score(d, x, min(r, OUTPUTS)) for d, r in zip(deltas, ranks.values(), strict=True)]
        weigh = reference.softmax_weights if weights == "softmax" else reference.uniform_weights
        shares = weigh(scores, 3, *([1.0] if weights == "softmax" else []))
        expected = base.weight.double() @ x + base.bias.double() + reference.merge_ties(deltas, shares, x, density)
        torch.testing.assert_close(out_TO[t].double(), expected, rtol=0, atol=2e-5)


def test_dare_inside_the_routing_is_the_dropped_factor(tmp_path):
    library, x_TI = one_layer_library(tmp_path / "experts", EQUAL), some_tokens()
    model, plain, alone = plain_layer(), plain_layer(), plain_layer()
    compose(model, library, Spectr(top_k=2, combine="dare:density=0.5"))
    compose(plain, library, Spectr(top_k=2))
    compose(alone, library.without("a"), Spectr(top_k=2, combine="dare:density=0.5"))
    assert torch.equal(model.layer.route(x_TI).scores_TE, plain.layer.route(x_TI).scores_TE)
    parts, whole = model.layer.stack().parts(), plain.layer.stack().parts()
    for name in library:
        assert torch.equal(parts[name].B, drop(whole[name].B, 0.5, seed=0, expert=name, module="layer"))
    assert torch.equal(alone.layer.stack().parts()["b"].B, parts["b"].B)


@pytest.mark.parametrize(
    "combine",
    ["raw-factors", "ties", "dare", "dare-ties", "knots", "ties:density=0.4", "dare-ties:density=0.9,trim=0.4"],
)
@pytest.mark.parametrize("router", [Spectr, Arrow, Lag], ids=lambda kind: kind.__name__)
def test_combinations_go_with_every_router_that_selects(tmp_path, combine, router):
    model, ids = tiny_llama(), tokens()
    before = logits(model, ids)
    routed = compose(model, peft_library(model, tmp_path / "experts", EQUAL), router(top_k=2, combine=combine))
    with trace(model) as record:
        assert not torch.equal(logits(model, ids), before)
    assert sum(record.shares().values()) == pytest.approx(1)
    routed.remove()
    assert torch.equal(logits(model, ids), before)


def test_an_unknown_combination():
    with pytest.raises(CompositionError, match="unknown combination 'outputz'"):
        Spectr(combine="outputz")


def test_a_shortlist_that_is_shorter_than_top_k():
    with pytest.raises(CompositionError, match="shortlist=1 and top_k=2"):
        Lag(shortlist=1, top_k=2)
