"""KnOTS among the chosen experts, against a dense reference and against the merge of the same name."""

from __future__ import annotations

import pytest
import torch

from holding import holding
from models import close, dense_deltas, random_factors, write_adapter
from one_layer import EQUAL, INPUTS, OUTPUTS, UNEQUAL, one_layer_library, plain_layer, some_tokens
from spectr import Arrow, ExpertLibrary, Seqr, Shortlist, Spectr, Uniform, compose
from spectr.combine import merge_knots
from spectr.combine.knots import coordinates
from spectr.errors import CompositionError
from spectr.merging import Knots, LowRank, Site
from spectr.spectral import Stack, reference
from spectr.spectral.align import left_basis

FEW = {"a": 1, "b": 2, "c": 3}  # fewer directions than there are outputs


def deltas_of(root, names):
    return [dense_deltas(root / name)["layer"] for name in names]


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("ranks", [EQUAL, UNEQUAL, FEW], ids=["equal", "unequal", "few"])
@pytest.mark.parametrize("weights", ["uniform", "softmax"])
def test_knots_inside_the_routing_equals_the_dense_reference(tmp_path, density, ranks, weights):
    model, x_TI = plain_layer(), some_tokens()
    base = model.layer
    compose(
        model, one_layer_library(tmp_path, ranks), Spectr(top_k=2, combine=f"knots:density={density}", weights=weights)
    )
    deltas, out_TO = deltas_of(tmp_path, ranks), model(x_TI)
    for t, x in enumerate(x_TI.double()):
        scores = [reference.spectral_score(d, x, min(r, OUTPUTS)) for d, r in zip(deltas, ranks.values(), strict=True)]
        weigh = reference.softmax_weights if weights == "softmax" else reference.uniform_weights
        shares = weigh(scores, 2, *([1.0] if weights == "softmax" else []))
        expected = base.weight.double() @ x + base.bias.double() + reference.merge_knots(deltas, shares, x, density)
        torch.testing.assert_close(out_TO[t].double(), expected, rtol=0, atol=1e-4)  # of a float32 SVD


def test_held_weights_are_merged_in_the_basis_of_all_experts(tmp_path):
    model, x_TI = plain_layer(), some_tokens()
    base = model.layer
    compose(model, one_layer_library(tmp_path, UNEQUAL), Spectr(top_k=2, combine="knots"))
    weights = [0.0, 0.7, 0.0, 0.3, 0.0]
    with holding(model.layer, weights=torch.tensor([weights])):
        deltas, out_TO = deltas_of(tmp_path, UNEQUAL), model(x_TI[None])[0]
    for t, x in enumerate(x_TI.double()):
        expected = base.weight.double() @ x + base.bias.double() + reference.merge_knots(deltas, weights, x, 1.0)
        torch.testing.assert_close(out_TO[t].double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("router", [Spectr, Arrow, Seqr], ids=lambda kind: kind.__name__)
def test_one_chosen_expert_is_itself(tmp_path, router):
    library, x_TI = one_layer_library(tmp_path, UNEQUAL), some_tokens()
    merged, plain = plain_layer(), plain_layer()
    compose(merged, library, router(top_k=1, combine="knots"))
    compose(plain, library, router(top_k=1))
    close(merged(x_TI), plain(x_TI), 1e-5)


def test_experts_that_share_an_input_factor_are_those_that_do_not(tmp_path):
    A, _ = random_factors(4, INPUTS, OUTPUTS, 0)
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, {"layer": (A, random_factors(4, INPUTS, OUTPUTS, seed)[1])})
    library, x_TI, out = ExpertLibrary.open(tmp_path), some_tokens(), []
    for router in (Seqr(top_k=2, combine="knots"), Spectr(top_k=2, combine="knots")):
        model = plain_layer()
        compose(model, library, router)
        out.append(model(x_TI))
    assert model.layer.mix_PR is None
    close(out[0], out[1], 1e-5)


def stack_of(deltas: list[LowRank]) -> Stack:
    return Stack(
        experts=tuple("abcdefg"[: len(deltas)]),
        ranks=tuple(delta.rank for delta in deltas),
        A_PI=torch.cat([delta.A for delta in deltas]),
        B_OP=torch.cat([delta.B for delta in deltas], dim=1),
    )


def routed_knots(deltas, x_TI, density=1.0):
    """The update where all experts have the same weight."""
    stack = stack_of(deltas)
    C_QP, U_OQ = coordinates(stack)
    weights_TE = torch.full((len(x_TI), len(deltas)), 1 / len(deltas))
    return merge_knots(x_TI @ stack.A_PI.mT, weights_TE, C_QP, stack.owner_P, U_OQ, density=density), (
        stack,
        C_QP,
        U_OQ,
    )


def test_experts_with_outputs_of_their_own_are_added_up_as_the_merge_of_that_name_does():
    """They share no direction, so that each coordinate is one expert's: the exact zeros of the others have no vote."""
    outputs = torch.eye(OUTPUTS)
    deltas = [
        LowRank(outputs[:, 2 * i : 2 * i + 2], 4.0**i * random_factors(2, INPUTS, OUTPUTS, i)[0]) for i in range(3)
    ]
    x_TI = some_tokens()
    total = sum(delta.dense() for delta in deltas)
    close(Knots().merge(deltas, Site("m", ("a", "b", "c"))).dense(), total, 1e-4)
    close(routed_knots(deltas, x_TI)[0], x_TI @ total.mT, 1e-4)


def test_signs_of_the_basis_make_no_difference():
    deltas = [LowRank(*random_factors(rank, INPUTS, OUTPUTS, rank)[::-1]) for rank in (3, 2)]
    x_TI = some_tokens()
    ours, (stack, C_QP, U_OQ) = routed_knots(deltas, x_TI, 0.5)
    signs_Q = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    turned_QP, turned_OQ = signs_Q[:, None] * C_QP, U_OQ * signs_Q
    weights_TE = torch.full((len(x_TI), 2), 0.5)
    close(merge_knots(x_TI @ stack.A_PI.mT, weights_TE, turned_QP, stack.owner_P, turned_OQ, density=0.5), ours, 1e-6)


@pytest.mark.parametrize("ranks", [(3, 0, 20), (0, 0), (16, 16)])
def test_the_basis_is_that_of_the_dense_updates_side_by_side(ranks):
    deltas = [LowRank(*random_factors(rank, INPUTS, OUTPUTS, i)[::-1]) for i, rank in enumerate(ranks)]
    U, S = left_basis((delta.A, delta.B) for delta in deltas)
    dense = torch.cat([delta.dense() for delta in deltas], dim=1).double()
    values = torch.linalg.svdvals(dense)
    torch.testing.assert_close(S.double(), values[values > 1e-6 * values[0]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(U.double() @ (U.double().mT @ dense), dense, rtol=0, atol=1e-4)


def test_updates_that_are_zero_are_merged_to_zero():
    zero = LowRank(torch.zeros(OUTPUTS, 2), torch.ones(2, INPUTS))
    for density in (0.5, 1.0):
        assert not routed_knots([zero, zero], some_tokens(), density)[0].any()


def test_an_expert_that_is_added_or_left_out_makes_the_basis_anew(tmp_path):
    library, x_TI = one_layer_library(tmp_path, EQUAL), some_tokens()
    model, few = plain_layer(), plain_layer()
    routed = compose(model, library, Uniform(combine="knots"))
    whole = model(x_TI)
    compose(few, library.without("e"), Uniform(combine="knots"))
    routed.discard("e")
    close(model(x_TI), few(x_TI), 1e-5)
    routed.add("e", tmp_path / "e")
    close(model(x_TI), whole, 1e-5)
    routed.allow([*"abcd"])
    close(model(x_TI), few(x_TI), 1e-5)


def test_a_shortlist_whose_experts_change_with_the_batch_is_refused():
    with pytest.raises(CompositionError, match="merges with all experts in memory"):
        Shortlist(size=4, token_router=Spectr(top_k=2, combine="knots"))
