"""Experts without general knowledge: the authors' subtraction against PEFT's, that of products against dense ones."""

from __future__ import annotations

import copy

import pytest
import torch

from models import close, dense_deltas, logits, peft_library, peft_on_new_transformers, tiny_llama, tokens
from spectr import Arrow, ExpertLibrary, Uniform, compose
from spectr.errors import MergeError
from spectr.merging import Recipe, get_method, merge_adapter, merge_into, residual_experts

NAMES, GENERAL = ("a", "b", "c"), ("x", "y")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("world"), tiny_llama()
    experts = peft_library(model, root / "experts", dict.fromkeys(NAMES, 4))
    general = peft_library(model, root / "general", dict.fromkeys(GENERAL, 4))
    return model, experts, general


@torch.no_grad()
def test_genknowsub_with_arrow_is_pefts(world, tmp_path):
    """A temperature so high that all weights are equal: PEFT's power iteration does not find the first direction."""
    from peft import ArrowConfig, create_arrow_model

    model, experts, general = world
    with peft_on_new_transformers():
        theirs = create_arrow_model(
            copy.deepcopy(model),
            task_specific_adapter_paths=[str(experts[name].weights.parent) for name in NAMES],
            general_adapter_paths=[str(general[name].weights.parent) for name in GENERAL],
            arrow_config=ArrowConfig(top_k=3, router_temperature=1e6, use_gks=True, rng_seed=0),
        ).eval()
    routed = compose(model, residual_experts(experts, general, tmp_path / "out"), Arrow(top_k=3, temperature=1e6))
    ours = logits(model, tokens())
    routed.remove()
    close(ours, logits(theirs, tokens()), 1e-4)


@torch.no_grad()
def test_of_products_the_general_experts_mean_update_is_subtracted(world, tmp_path):
    _, experts, general = world
    found = residual_experts(experts, general, tmp_path / "out", subtract="products")
    mean = [dense_deltas(general[name].weights.parent) for name in GENERAL]
    for name in NAMES:
        own, ours = dense_deltas(experts[name].weights.parent), dense_deltas(found[name].weights.parent)
        for module, delta in own.items():
            close(ours[module], delta - (mean[0][module] + mean[1][module]) / 2, 1e-4)
    assert found["a"].ranks == (12,)


@torch.no_grad()
def test_the_two_are_not_the_same(world, tmp_path):
    model, experts, general = world
    out = []
    for subtract in ("genknowsub", "products"):
        found = residual_experts(experts, general, tmp_path / subtract, subtract=subtract)
        routed = compose(model, found, Uniform())
        out.append(logits(model, tokens()))
        routed.remove()
    assert float((out[0] - out[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("subtract", ["genknowsub", "products"])
@torch.no_grad()
def test_a_merge_subtracts_as_the_residual_experts_do(world, tmp_path, subtract):
    model, experts, general = world
    both = ExpertLibrary.from_adapters(
        {name: some[name].weights.parent for some in (experts, general) for name in some}
    )
    recipe = Recipe(experts=("a",), method=get_method(subtract), subtract=GENERAL)
    theirs = residual_experts(experts, general, tmp_path / "out", subtract=subtract)["a"]
    expected = dense_deltas(theirs.weights.parent)
    merged = merge_adapter(both, recipe)
    for module, delta in merged.deltas.items():
        close(delta.dense().double(), expected[module], 1e-5)
    assert {delta.rank for delta in merged.deltas.values()} == set(theirs.ranks)
    before = {module: model.get_submodule(module).weight.clone() for module in expected}
    made = merge_into(model, both, recipe)
    for module, delta in expected.items():
        close(model.get_submodule(module).weight, (before[module] + delta).float(), 1e-5)
    made.undo()


def test_a_merge_refuses_factors_of_other_sizes_and_products_do_not(world, tmp_path):
    model, experts, _ = world
    other = peft_library(model, tmp_path / "general", {"x": 2})
    both = ExpertLibrary.from_adapters({"a": experts["a"].weights.parent, "x": other["x"].weights.parent})
    recipes = [Recipe(experts=("a",), method=get_method(m), subtract=("x",)) for m in ("genknowsub", "products")]
    for refused in (lambda: merge_adapter(both, recipes[0]), lambda: merge_into(model, both, recipes[0])):
        with pytest.raises(MergeError, match="different modules or sizes"):
            refused()
    assert merge_adapter(both, recipes[1]).deltas


def test_factors_of_other_sizes_are_refused_and_products_are_not(world, tmp_path):
    model, experts, _ = world
    other = peft_library(model, tmp_path / "general", {"x": 2})
    with pytest.raises(MergeError, match="different modules or sizes"):
        residual_experts(experts, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert residual_experts(experts, other, tmp_path / "out", subtract="products")["a"].ranks == (6,)
    with pytest.raises(MergeError, match="one of genknowsub, products"):
        residual_experts(experts, other, tmp_path / "more", subtract="all")
