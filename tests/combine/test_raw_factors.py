"""The merge of the adapters' own factors, against the reference and against PEFT's linear merge of adapters."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from holding import holding
from models import (
    close,
    logits,
    peft_library,
    peft_on_new_transformers,
    random_factors,
    tiny_llama,
    tokens,
    write_adapter,
)
from one_layer import EQUAL, INPUTS, OUTPUTS, UNEQUAL, one_layer_library, plain_layer, some_tokens
from spectr import Arrow, ExpertLibrary, Lag, Seqr, Spectr, Uniform, compose
from spectr.errors import CompositionError
from spectr.spectral import reference

ALPHA = 6.0
WIDE = dict.fromkeys("abcde", OUTPUTS + 3)  # more directions than an update can have


def own_factors(ranks):
    pairs = [random_factors(rank, INPUTS, OUTPUTS, seed) for seed, rank in enumerate(ranks.values())]
    return [A.double() for A, _ in pairs], [B.double() * ALPHA / len(A) for A, B in pairs]


def expected(layer, ranks, weights_TE, x_TI):
    A, B = own_factors(ranks)
    merged = [
        reference.merge_factors(A, B, weights, x) for weights, x in zip(weights_TE.tolist(), x_TI.double(), strict=True)
    ]
    return x_TI.double() @ layer.weight.double().T + layer.bias.double() + torch.stack(merged)


ROUTERS = [
    Uniform(combine="raw-factors"),
    Arrow(top_k=2, combine="raw-factors"),
    Arrow(top_k=3, weights="uniform", combine="raw-factors"),
    Spectr(top_k=3, combine="raw-factors"),
    Spectr(top_k=2, score="projection", combine="raw-factors"),
    Seqr(top_k=2, combine="raw-factors"),
    Lag(shortlist=3, top_k=2, combine="raw-factors"),
]


@torch.no_grad()
@pytest.mark.parametrize("ranks", [EQUAL, WIDE], ids=["rank 4", "a rank above the layer's"])
@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_the_merge_equals_the_reference_of_the_adapters_own_factors(tmp_path, router, ranks):
    model, plain, x_TI = plain_layer(), plain_layer(), some_tokens()
    layer = model.layer
    library = one_layer_library(tmp_path, ranks, ALPHA)
    compose(model, library, router)
    compose(plain, library, replace(router, combine="outputs"))
    decision = model.layer.route(x_TI)
    assert torch.equal(decision.weights_TE, plain.layer.route(x_TI).weights_TE), "the merge has no say in the choice"
    torch.testing.assert_close(
        model(x_TI).double(), expected(layer, ranks, decision.weights_TE, x_TI), rtol=0, atol=2e-5
    )


@torch.no_grad()
def test_held_weights_and_some_of_the_experts(tmp_path):
    model, x_TI = plain_layer(), some_tokens()
    layer = model.layer
    routed = compose(model, one_layer_library(tmp_path, EQUAL, ALPHA), Spectr(top_k=2, combine="raw-factors"))
    weights = [0.0, 0.7, 0.0, 0.3, 0.0]
    with holding(model.layer, weights=torch.tensor([weights])):
        out_TO = model(x_TI[None])[0]
    torch.testing.assert_close(
        out_TO.double(), expected(layer, EQUAL, torch.tensor([weights] * len(x_TI)), x_TI), rtol=0, atol=2e-5
    )
    routed.allow(["b", "d", "e"])
    some = {name: EQUAL[name] for name in "bde"}
    alone = plain_layer()
    compose(alone, ExpertLibrary.from_adapters({n: tmp_path / n for n in some}), Spectr(top_k=2, combine="raw-factors"))
    close(model(x_TI), alone(x_TI), 1e-5)


@torch.no_grad()
def test_an_expert_that_is_added_and_one_that_is_removed(tmp_path):
    library = one_layer_library(tmp_path, EQUAL, ALPHA)
    model, whole, x_TI = plain_layer(), plain_layer(), some_tokens()
    router = Spectr(top_k=2, combine="raw-factors")
    routed = compose(model, library.without("c"), router)
    routed.add("c", tmp_path / "c")
    compose(whole, library, router)
    close(model(x_TI), whole(x_TI), 0)
    routed.discard("a")
    close(model.layer.raw_A_PI, whole.layer.raw_A_PI[4:], 0)


@torch.no_grad()
def test_one_chosen_expert_is_itself(tmp_path):
    library, x_TI = one_layer_library(tmp_path, EQUAL), some_tokens()
    merged, plain = plain_layer(), plain_layer()
    compose(merged, library, Spectr(top_k=1, combine="raw-factors"))
    compose(plain, library, Spectr(top_k=1))
    close(merged(x_TI), plain(x_TI), 2e-5)


@torch.no_grad()
def test_the_split_of_an_update_into_factors_counts_here_and_nowhere_else(tmp_path):
    """``-B`` and ``-A`` of one expert are the same update, and another mean of factors."""
    out = {}
    for sign in (1, -1):
        for seed, name in enumerate("ab"):
            A, B = random_factors(4, INPUTS, OUTPUTS, seed)
            flip = sign if name == "b" else 1
            write_adapter(tmp_path / str(sign) / name, {"layer": (flip * A, flip * B)})
        for combine in ("outputs", "factors", "raw-factors"):
            model = plain_layer()
            compose(model, ExpertLibrary.open(tmp_path / str(sign)), Uniform(combine=combine))
            out[combine, sign] = model(some_tokens())
    close(out["outputs", 1], out["outputs", -1], 1e-5)
    close(out["factors", 1], out["factors", -1], 1e-5)
    assert float((out["raw-factors", 1] - out["raw-factors", -1]).abs().max()) > 0.1


def test_unequal_ranks_are_refused(tmp_path):
    with pytest.raises(CompositionError, match="unequal ranks"):
        compose(plain_layer(), one_layer_library(tmp_path, UNEQUAL), Uniform(combine="raw-factors"))


@torch.no_grad()
def test_the_mean_of_all_is_pefts_linear_merge(tmp_path):
    """PEFT puts the square root of weight and scale on both factors: ``w = 1 / E^2`` is a mean of each."""
    model, ids, names = tiny_llama(), tokens(), ["a", "b", "c"]
    library = peft_library(model, tmp_path, dict.fromkeys(names, 4))
    with peft_on_new_transformers():
        peer = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "a"), adapter_name="a")
        for name in names[1:]:
            peer.load_adapter(str(tmp_path / name), adapter_name=name)
        peer.add_weighted_adapter(names, [1 / 9] * 3, "merged", combination_type="linear")
        peer.set_adapter("merged")
        theirs = logits(peer, ids)
    compose(model, library, Uniform(combine="raw-factors"))
    close(logits(model, ids), theirs, 1e-5)
