"""Every router on one linear layer, against the reference, token by token; and by name, and against PEFT's Arrow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from models import (
    close,
    dense_deltas,
    logits,
    peft_deltas,
    peft_library,
    peft_model,
    peft_on_new_transformers,
    random_factors,
    tiny_llama,
    tokens,
    write_adapter,
)
from one_layer import EQUAL, EXPERTS, INPUTS, OUTPUTS, TOKENS, UNEQUAL, one_layer_library, plain_layer, some_tokens
from spectr import (
    Arrow,
    ExpertLibrary,
    Oracle,
    Spectr,
    Uniform,
    compose,
)
from spectr.routers import Router
from spectr.spectral import reference

FACTOR_ROUTERS = [
    Spectr(top_k=1, combine="factors"),
    Spectr(top_k=3, combine="factors"),
    Spectr(top_k=3, combine="factors", weights="softmax", temperature=0.5),
    Spectr(top_k=2, combine="factors", score="projection"),
    Arrow(top_k=2, combine="factors"),
    Uniform(combine="factors"),
]
ROUTERS = [
    Spectr(top_k=1),
    Spectr(top_k=3),
    Spectr(top_k=EXPERTS),
    Spectr(top_k=3, weights="softmax"),
    Spectr(top_k=2, weights="softmax", temperature=0.25),
    Spectr(top_k=2, score="projection"),
    Spectr(top_k=3, score="projection", weights="softmax", temperature=2.0),
    Arrow(top_k=2),
    Arrow(top_k=3, temperature=0.5),
    Arrow(top_k=2, weights="uniform"),
    Uniform(),
    Oracle(expert="c"),
]
CASES = [(router, EQUAL) for router in ROUTERS + FACTOR_ROUTERS] + [(router, UNEQUAL) for router in ROUTERS]


def named(value):
    return repr(value) if isinstance(value, Router) else "equal" if value is EQUAL else "unequal"


def score(router, delta, x, rank):
    rank = min(rank, *delta.shape)
    if isinstance(router, Arrow):
        return reference.arrow_score(delta, x)
    if isinstance(router, Spectr):
        return {"spectral": reference.spectral_score, "projection": reference.projection_score}[router.score](
            delta, x, rank
        )
    return 1.0


def weigh(router, scores):
    if isinstance(router, Uniform | Oracle):
        return reference.uniform_weights(scores, len(scores))
    if router.weights == "softmax":
        return reference.softmax_weights(scores, router.top_k, router.temperature)
    return reference.uniform_weights(scores, router.top_k)


def spectral_factors(router, delta, rank):
    U, S, Vh = reference.dense_svd(delta, min(rank, *delta.shape))
    if isinstance(router, Spectr) and router.score == "projection":
        return Vh, U * S
    return S[:, None] * Vh, U


def resident(router, ranks):
    return ["c"] if isinstance(router, Oracle) else sorted(ranks)


@pytest.mark.parametrize(("router", "ranks"), CASES, ids=named)
def test_a_routed_layer_equals_the_reference_token_by_token(tmp_path, router, ranks):
    model, x_TI = plain_layer(), some_tokens()
    layer = model.layer
    compose(model, one_layer_library(tmp_path / "experts", ranks), router)
    names = resident(router, ranks)
    deltas = [dense_deltas(tmp_path / "experts" / name)["layer"] for name in names]
    factors = [spectral_factors(router, d, ranks[n]) for d, n in zip(deltas, names, strict=True)]
    decision, out_TO = model.layer.route(x_TI), model(x_TI)
    for t, x in enumerate(x_TI.double()):
        scores = [score(router, delta, x, ranks[name]) for delta, name in zip(deltas, names, strict=True)]
        weights = weigh(router, scores)
        if router.combine == "factors":
            update = reference.merge_factors([A for A, _ in factors], [B for _, B in factors], weights, x)
        else:
            update = reference.merge_outputs(deltas, weights, x)
        expected = layer.weight.double() @ x + layer.bias.double() + update
        torch.testing.assert_close(decision.scores_TE[t].double(), torch.tensor(scores).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decision.weights_TE[t].double(), torch.tensor(weights).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(out_TO[t].double(), expected, rtol=0, atol=2e-5)


LOW = [Spectr(top_k=2), Spectr(top_k=3, weights="softmax"), Arrow(top_k=2), Uniform(), Oracle(expert="c")]
LOW += [Spectr(top_k=2, score="projection")]
LOW_CASES = [(router, ranks) for router in LOW for ranks in (EQUAL, UNEQUAL)]
LOW_CASES += [(Spectr(top_k=2, combine="factors"), EQUAL), (Arrow(top_k=3, combine="factors"), EQUAL)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("router", "ranks"), LOW_CASES, ids=named)
def test_in_half_precision_a_routed_layer_equals_the_reference_on_its_rounded_factors(tmp_path, router, ranks, dtype):
    eps = torch.finfo(dtype).eps
    model, x_TI = plain_layer(dtype), some_tokens(dtype)
    layer = model.layer
    compose(model, one_layer_library(tmp_path, ranks), router)
    assert {model.layer.A_PI.dtype, model.layer.B_OP.dtype} == {dtype}
    parts = [part.mapped(Tensor.double) for part in model.layer.stack().parts().values()]
    decision, out_TO = model.layer.route(x_TI), model(x_TI)
    assert decision.scores_TE.dtype == torch.float32
    compared = 0
    for t, x in enumerate(x_TI.double()):
        scores = [float((part.A @ x).norm()) for part in parts]
        if isinstance(router, Arrow):
            scores = [float((part.own.prototypes_EI[0] @ x).abs()) for part in parts]
        if isinstance(router, Uniform | Oracle):
            scores = [1.0] * len(parts)
        size = max(scores)
        torch.testing.assert_close(
            decision.scores_TE[t].double(), torch.tensor(scores).double(), rtol=eps, atol=eps * size
        )
        weights = weigh(router, scores)
        ordered = sorted(scores, reverse=True)
        k = router.selection.k or len(scores)
        if k < len(scores) and ordered[k - 1] - ordered[k] < 2 * eps * size:
            continue  # rounding may choose either
        compared += 1
        wobble = 2 * eps * size  # of a weight, by the rounding of scores, at temperature 1
        torch.testing.assert_close(decision.weights_TE[t].double(), torch.tensor(weights).double(), rtol=0, atol=wobble)
        if router.combine == "factors":
            update = reference.merge_factors([p.A for p in parts], [p.B for p in parts], weights, x)
        else:
            update = reference.merge_outputs([p.B @ p.A for p in parts], weights, x)
        plain = layer.weight.double() @ x + layer.bias.double()
        longest = max(float(p.B.norm() * p.A.norm() * x.norm()) for p in parts)
        tolerance = eps * (2 * float(plain.abs().max()) + longest)
        torch.testing.assert_close(out_TO[t].double(), plain + update, rtol=0, atol=tolerance)
    assert compared >= TOKENS * 2 // 3


@pytest.mark.parametrize("ranks", [EQUAL, UNEQUAL], ids=named)
def test_scores_of_large_float16_inputs_do_not_overflow(tmp_path, ranks):
    """Squares of h are far above float16's largest number, h is not."""
    model, x_TI = plain_layer(torch.float16), some_tokens(torch.float16, size=2000.0)
    compose(model, one_layer_library(tmp_path, ranks, alpha=4.0), Spectr(top_k=2))
    decision = model.layer.route(x_TI)
    parts = model.layer.stack().parts().values()
    expected = torch.stack([(x_TI.double() @ part.A.double().T).norm(dim=-1) for part in parts], dim=-1)
    assert float(expected.max()) > 1000
    eps = torch.finfo(torch.float16).eps
    torch.testing.assert_close(decision.scores_TE.double(), expected, rtol=eps, atol=eps * float(expected.max()))
    assert torch.isfinite(model(x_TI)).all()


@pytest.mark.parametrize("combine", ["outputs", "factors"])
def test_one_chosen_expert_of_top_1_is_that_expert_itself_in_either_combination(tmp_path, combine):
    model, x_TI = plain_layer(), some_tokens()
    base = model.layer
    compose(model, one_layer_library(tmp_path, EQUAL), Spectr(top_k=1, combine=combine))
    chosen = model.layer.route(x_TI).weights_TE.argmax(-1)
    deltas = torch.stack([dense_deltas(tmp_path / name)["layer"] for name in sorted(EQUAL)])
    expected = base(x_TI).double() + torch.einsum("toi,ti->to", deltas[chosen], x_TI.double())
    torch.testing.assert_close(model(x_TI).double(), expected, rtol=0, atol=1e-5)


def test_merged_outputs_do_not_depend_on_the_signs_of_the_factors(tmp_path):
    """B and A both negated are the same update: what the factors say is not what counts."""
    twin = tmp_path / "twin"
    for seed, (name, rank) in enumerate(UNEQUAL.items()):
        A, B = random_factors(rank, INPUTS, OUTPUTS, seed)
        write_adapter(twin / name, {"layer": (-A, -B)}, alpha=6.0)
    outs = []
    for library in (one_layer_library(tmp_path / "one", UNEQUAL), ExpertLibrary.open(twin)):
        model = plain_layer()
        compose(model, library, Spectr(top_k=2))
        outs.append(model(some_tokens()))
    torch.testing.assert_close(*outs, rtol=0, atol=1e-5)


# Against PEFT


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


PEFT_CONFIGS = {
    "alpha over rank": {"lora_alpha": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
        "alpha_pattern": {"q_proj": 5, "down_proj": 1},
    },
    "patterns and rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 2}},
}


@pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS.keys())
def test_the_oracle_is_pefts_model_of_that_adapter(llama, tmp_path, config):
    library = peft_library(llama, tmp_path, {"a": 4, "b": 4}, **config)
    theirs = logits(peft_model(llama, tmp_path / "b"), tokens())
    assert (theirs - logits(llama, tokens())).abs().max() > 1
    routed = compose(llama, library, Oracle(expert="b"))
    ours = logits(llama, tokens())
    routed.remove()
    close(ours, theirs, 1e-5)


def test_uniform_is_the_mean_update_merged_into_the_weights(llama, tmp_path):
    library = peft_library(llama, tmp_path, {"a": 4, "b": 2, "c": 8})
    merged = copy.deepcopy(llama)
    for name in library.names:
        for module, delta in peft_deltas(llama, tmp_path / name).items():
            merged.get_submodule(module).weight.data += delta / len(library)
    routed = compose(llama, library, Uniform())
    ours = logits(llama, tokens())
    routed.remove()
    close(ours, logits(merged, tokens()), 1e-5)


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 1.0), (3, 0.25), (4, 4.0)])
def test_arrow_is_pefts_arrow(llama, tmp_path, top_k, temperature):
    """The adapters have a clear first direction, so that PEFT's 15 power iterations arrive where an SVD does."""
    from peft import ArrowConfig, create_arrow_model

    library = peft_library(llama, tmp_path, dict.fromkeys("abcd", 4), gap=True)
    with peft_on_new_transformers():
        theirs = create_arrow_model(
            copy.deepcopy(llama),
            task_specific_adapter_paths=[str(tmp_path / name) for name in library.names],
            arrow_config=ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0),
        ).eval()
    routed = compose(llama, library, Arrow(top_k=top_k, temperature=temperature))
    ours = logits(llama, tokens())
    routed.remove()
    close(ours, logits(theirs, tokens()), 1e-4)
