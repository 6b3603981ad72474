"""Each family of transformers with fused MoE experts that a tiny model can be made of, against PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from models import TEXT, TOKENS, build, close, peft_adapter, peft_model, random_factors, tokens, write_adapter
from spectr import ExpertLibrary, Oracle, compose
from trained_modules import ROWS

LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
SMALL = {
    **{**TEXT, **TOKENS, **LATENT},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts", "decoder_sparse_step"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "num_key_value_heads", "index_n_heads"), 2),
    **{"head_dim": 8, "index_head_dim": 8, "index_topk": 8, "sliding_window": 16, "mamba_d_state": 4},
    **{"mamba_expand": 2, "mamba_n_heads": 8, "mamba_n_groups": 1, "hidden_size_per_layer_input": 0},
    **{"vocab_size_per_layer_input": TEXT["vocab_size"], "num_kv_shared_layers": 0, "enable_moe_block": True},
}
LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type")
PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_period": 2, "expert_layer_offset": 1}
CHANGES: dict[str, dict[str, Any]] = {  # None: the configuration computes it
    "AXK1": {"head_dim": None},
    "DeepseekV3": {"head_dim": None},
    "Gemma4": {"head_dim": None, "config": "Gemma4TextConfig"},
    "Glm4MoeLite": {"head_dim": None},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"]},
    "Jamba": {"layer_types": None, "layers_block_type": None, "mamba_dt_rank": 2, **PERIODS},
    "Lfm2Moe": {"layer_types": ["full_attention"] * 2},
    "NemotronH": {"layers_block_type": ["attention", "moe"], "layer_types": None},
    "Qwen3_5Moe": {"config": "Qwen3_5MoeTextConfig"},
    "Zaya": {"num_experts_per_tok": 1},
}
FAMILIES = (
    "Afmoe",
    "AXK1",
    "Cohere2Moe",
    "DeepseekV2",
    "DeepseekV3",
    "Dots1",
    "Ernie4_5_Moe",
    "ExaoneMoe",
    "FlexOlmo",
    "Gemma4",
    "Glm4Moe",
    "Glm4MoeLite",
    "GptOss",
    "GraniteMoe",
    "GraniteMoeHybrid",
    "GraniteMoeShared",
    "HunYuanMoEV1",
    "Jamba",
    "KimiLinear",
    "Lfm2Moe",
    "MiniMax",
    "MiniMaxM2",
    "Mixtral",
    "NemotronH",
    "Olmoe",
    "Phimoe",
    "Qwen2Moe",
    "Qwen3_5Moe",
    "Qwen3Moe",
    "Qwen3Next",
    "Zaya",
)


def tiny(family: str) -> nn.Module:
    """A model of two layers; of the small settings those that its configuration knows."""
    changes = dict(CHANGES.get(family, {}))
    config_class = getattr(transformers, changes.pop("config", f"{family}Config"))
    whole = config_class()
    kinds = {name: [getattr(whole, name)[0], getattr(whole, name)[-1]] for name in LAYERS if getattr(whole, name, None)}
    small = {name: value for name, value in SMALL.items() if name not in changes and hasattr(whole, name)}
    settings = {name: value for name, value in {**kinds, **small, **changes}.items() if value is not None}
    return build(getattr(transformers, f"{family}ForCausalLM"), config_class(**settings))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_row_has_its_adapter_of_moe_experts(family, tmp_path):
    model, ids = tiny(family), tokens()
    [(name, experts), *_] = [each for each in model.named_modules() if hasattr(each[1], "is_transposed")]
    leaf = name.rpartition(".")[2]
    parameters = [f"{leaf}.{'gate_up_proj' if experts.has_gate else 'up_proj'}", f"{leaf}.down_proj"]
    folders = {
        each: peft_adapter(model, tmp_path / each, seed, targets=[], target_parameters=parameters, lora_dropout=0.0)
        for seed, each in enumerate("ab", start=1)
    }
    before = model(ids, use_cache=False).logits
    want = torch.cat(
        [peft_model(model, folder)(ids[[row]], use_cache=False).logits for row, folder in enumerate(folders.values())]
    )
    assert (want - before).norm() > 0.01 * before.norm()
    routed = compose(model, ExpertLibrary.from_adapters(folders), ROWS)
    with routed.prompt.using(torch.eye(2)):
        close(model(ids, use_cache=False).logits, want)


def routers_that_return_more() -> dict[str, nn.Module]:
    """Models whose MoE routers are subclasses of ``nn.Linear`` and return what they choose too."""
    settings = {**TEXT, **TOKENS, "head_dim": 8, "num_key_value_heads": 2, "intermediate_size_mlp": 48}
    settings |= {"num_local_experts": 4, "interleave_moe_layer_step": 1}
    llama4 = build(transformers.Llama4ForCausalLM, transformers.Llama4TextConfig(**settings))
    return {"feed_forward.router": llama4, "mlp.router": tiny("Phimoe")}


@pytest.mark.parametrize("router", ["feed_forward.router", "mlp.router"])
@torch.no_grad()
def test_routers_that_return_more_than_their_product(router, tmp_path):
    model, ids = routers_that_return_more()[router], tokens()
    names = [f"model.layers.{layer}.{router}" for layer in range(2)]
    folders, want = {}, []
    for row, name in enumerate("ab"):
        factors = {each: random_factors(2, 32, 4, seed=10 * row + i) for i, each in enumerate(names)}
        folders[name] = write_adapter(tmp_path / name, factors, alpha=8, target_modules="all-linear")
        merged = copy.deepcopy(model)
        for each, (A, B) in factors.items():
            merged.get_submodule(each).weight += 4 * B @ A
        want.append(merged(ids[[row]]).logits)
    before = model(ids).logits
    assert (torch.cat(want) - before).norm() > 0.01 * before.norm()
    routed = compose(model, ExpertLibrary.from_adapters(folders), ROWS)
    with routed.prompt.using(torch.eye(2)):
        close(model(ids).logits, torch.cat(want))


GATED, NUMBERED = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
OLD = {  # where older versions of transformers had a module for each MoE expert, and its projections
    "AXK1": ("mlp", GATED),
    "Jamba": ("feed_forward", GATED),
    "Lfm2Moe": ("feed_forward", NUMBERED),
    "MiniMax": ("block_sparse_moe", NUMBERED),
    "Mixtral": ("block_sparse_moe", NUMBERED),
    "NemotronH": ("mixer", ("up_proj", "down_proj")),
    "Olmoe": ("mlp", GATED),
    "Phimoe": ("block_sparse_moe", NUMBERED),
    "Qwen2Moe": ("mlp", GATED),
    "Qwen3Moe": ("mlp", GATED),
}


@pytest.mark.parametrize("family", OLD)
@torch.no_grad()
def test_factors_of_each_moe_expert_are_those_of_merged_weights(family, tmp_path):
    """PEFT drops such factors of some families, so that weights merged by hand are compared with."""
    model, ids = tiny(family), tokens()
    merged, (part, projections) = copy.deepcopy(model), OLD[family]
    factors = {}
    for name, experts in model.named_modules():
        if not hasattr(experts, "is_transposed"):
            continue
        old = f"{name.rpartition('.')[0].rpartition('.')[0]}.{part}.experts"
        old = old.replace("model.", "backbone.", 1) if family == "NemotronH" else old
        fused = merged.get_submodule(name)
        hidden, inner = experts.down_proj.shape[1:]
        for j in range(len(experts.down_proj)):
            for place, side in enumerate(projections):
                sizes = (inner, hidden) if side == projections[-1] else (hidden, inner)
                A, B = factors[f"{old}.{j}.{side}"] = random_factors(2, *sizes, seed=len(factors))
                into = fused.down_proj if side == projections[-1] else getattr(fused, "gate_up_proj", None)
                into = fused.up_proj if into is None else into
                start = 0 if side == projections[-1] else place * inner
                into[j, start : start + len(B)] += 4 * B @ A
    folder = write_adapter(tmp_path / "a", factors, alpha=8, target_modules=list(projections))
    want, before = merged(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    assert (want - before).norm() > 0.01 * before.norm()
    compose(model, ExpertLibrary.from_adapters({"a": folder}), Oracle(expert="a"))
    close(model(ids, use_cache=False).logits, want)
