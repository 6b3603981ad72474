"""Names of factors of mixtures of experts: PEFT's wrappers and the modules of older versions, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_on_disk import of_others
from models import close, logits, peft_model, random_factors, tiny_llama, tokens, write_adapter
from moe import EXPERTS, moe_adapter, tiny_moe
from spectr import ExpertLibrary, Oracle, Spectr, compose
from spectr.composition.multi_router import MultiRouter
from spectr.errors import AdapterError, CompositionError, MergeError
from spectr.merging import make_recipe, merge_adapter, merge_into

OLD = {
    "Qwen3Moe": ("mlp.experts", {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}, "mlp.gate"),
    "Mixtral": ("block_sparse_moe.experts", {"w1": (32, 48), "w3": (32, 48), "w2": (48, 32)}, "block_sparse_moe.gate"),
}


def old_adapter(folder: Path, family: str, without=(), gate: bool = False, **config) -> Path:
    """As transformers 4 named modules: a pair of factors for each MoE expert's projection."""
    experts, projections, router = OLD[family]
    factors = {
        f"model.layers.{layer}.{experts}.{expert}.{name}": random_factors(4, *sizes, seed=100 * layer + expert)
        for layer in range(2)
        for expert in range(4)
        for name, sizes in projections.items()
        if name not in without and (layer, expert) not in without
    }
    targets = [name for name in projections if name not in without]
    if gate:
        factors["model.layers.1." + router] = random_factors(4, 32, 4, seed=9)
        targets.append("gate")
    return write_adapter(folder, factors, target_modules=targets, **config)


def quiet_peft(model, folder: Path):
    """PEFT's own model; it says that rank patterns of parameters match no module."""
    with of_others():
        return peft_model(model, folder)


@pytest.mark.parametrize("family", OLD)
@pytest.mark.parametrize("gate", [False, True])
def test_factors_for_each_moe_expert_become_those_of_parameters(family, gate, tmp_path):
    base, ids = tiny_moe(family), tokens()
    folder = old_adapter(tmp_path / "a", family, gate=gate)
    want = logits(quiet_peft(base, folder), ids)
    compose(base, ExpertLibrary.from_adapters({"a": folder}), Oracle(expert="a"))
    close(logits(base, ids), want)


def test_a_moe_expert_without_factors_is_left_alone(tmp_path):
    base, ids = tiny_moe(), tokens()
    some = old_adapter(tmp_path / "some", "Qwen3Moe", without=[(0, 2), (1, 0)])
    whole = old_adapter(tmp_path / "whole", "Qwen3Moe")
    tensors = load_file(whole / "adapter_model.safetensors")
    zero = {k: 0 * v if ".0.mlp.experts.2." in k or ".1.mlp.experts.0." in k else v for k, v in tensors.items()}
    save_file(zero, whole / "adapter_model.safetensors")
    want = logits(quiet_peft(base, whole), ids)
    compose(base, ExpertLibrary.from_adapters({"a": some}), Oracle(expert="a"))
    close(logits(base, ids), want)


def test_ranks_of_single_projections_may_differ(tmp_path):
    base, ids = tiny_moe(), tokens()
    name = "model.layers.0.mlp.experts.1.up_proj"
    factors = {
        f"model.layers.0.mlp.experts.{expert}.{side}": random_factors(4, *sizes, seed=expert)
        for expert in range(4)
        for side, sizes in OLD["Qwen3Moe"][1].items()
    }
    alike = write_adapter(tmp_path / "alike", factors, target_modules=sorted({n.rpartition(".")[2] for n in factors}))
    A, B = factors[name]
    split = {**factors, name: (torch.cat([A, A]), torch.cat([0.5 * B, 0.5 * B], dim=1))}
    config = {"rank_pattern": {name: 8}, "alpha_pattern": {name: 32}}
    other = write_adapter(tmp_path / "other", split, target_modules=["gate_proj", "up_proj", "down_proj"], **config)
    found = []
    for folder in (alike, other):
        model = copy.deepcopy(base)
        compose(model, ExpertLibrary.from_adapters({"a": folder}), Oracle(expert="a"))
        found.append(logits(model, ids))
    close(*found)


def test_gate_without_up_is_refused_as_peft_does(tmp_path):
    base = tiny_moe()
    folder = old_adapter(tmp_path / "a", "Qwen3Moe", without=["up_proj"])
    with pytest.raises(ValueError, match="without also targeting"):
        quiet_peft(base, folder)
    with pytest.raises(AdapterError, match="gate_proj of MoE experts without up_proj"):
        compose(base, ExpertLibrary.from_adapters({"a": folder}), Oracle(expert="a"))


def test_targets_and_factors_that_do_not_agree_are_refused(tmp_path):
    base = tiny_moe()
    folder = moe_adapter(base, tmp_path / "a", 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    for changed, says in (
        ({"target_parameters": EXPERTS[:1]}, "has 2 pairs of factors for parameters"),
        ({"r": 2}, "has factors of rank 16"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(AdapterError, match=says):
            compose(base, ExpertLibrary.from_adapters({"a": folder}), Oracle(expert="a"))


def test_what_takes_linear_layers_alone_refuses_parameters(tmp_path):
    base = tiny_moe()
    folders = {name: moe_adapter(base, tmp_path / name, seed) for seed, name in enumerate("ab")}
    library = ExpertLibrary.from_adapters(folders)
    for combine in ("knots", "raw-factors"):
        with pytest.raises(CompositionError, match="fused parameters are adapted by"):
            compose(base, library, Spectr(top_k=2, combine=combine))
    with pytest.raises(MergeError, match="adapts parameters by name"):
        merge_adapter(library, make_recipe(library, ["a", "b"], "average"))
    makers = {name: lambda model: compose(model, library, Spectr(top_k=1)) for name in ("one", "two")}
    with pytest.raises(CompositionError, match="several routers cannot share the model"):
        MultiRouter(base, makers)
    assert not hasattr(base.model.layers[0].mlp.experts, "is_routed")


def test_a_merge_into_the_base_is_peft_merged(tmp_path):
    base, ids = tiny_moe(), tokens()
    folders = {
        name: moe_adapter(base, tmp_path / name, seed, [*EXPERTS, "gate.weight"]) for seed, name in enumerate("ab")
    }
    before, right = logits(base, ids), copy.deepcopy(base)
    for folder in folders.values():
        right = peft_model(right, folder).merge_and_unload()
    library = ExpertLibrary.from_adapters(folders)
    merged = merge_into(base, library, make_recipe(library, ["a", "b"], "linear", weights=[1.0, 1.0]))
    close(logits(base, ids), logits(right, ids))
    merged.undo()
    assert torch.equal(logits(base, ids), before)


def test_weights_of_linear_layers_may_be_named_as_parameters(tmp_path):
    base, ids = tiny_llama(), tokens()
    patterns = {"rank_pattern": {"q_proj.weight": 2}, "alpha_pattern": {"q_proj.weight": 3}}
    folder = moe_adapter(base, tmp_path / "a", 1, ["q_proj.weight", "up_proj.weight"], ["v_proj"], **patterns)
    want = logits(peft_model(base, folder), ids)
    routed = compose(base, ExpertLibrary.from_adapters({"a": folder}), Oracle(expert="a"))
    close(logits(base, ids), want)
    assert "model.layers.0.self_attn.q_proj" in routed.layers


def test_parameters_that_cannot_be_routed_are_named(tmp_path):
    folder = moe_adapter(tiny_llama(), tmp_path / "a", 1, ["embed_tokens.weight"], ["v_proj"])
    with pytest.raises(CompositionError, match=r"embed_tokens \(Embedding\), which are not linear"):
        compose(tiny_llama(), ExpertLibrary.from_adapters({"a": folder}), Oracle(expert="a"))
