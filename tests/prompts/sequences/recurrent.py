"""Tiny models of the families of transformers that are recurrent, hybrid or sliding, or that have no cache."""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from sequences import World
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from models import TOKENS, VOCAB, build

# Class, configuration, its settings, and the modules that experts adapt.
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "initializer_range": 0.25, **TOKENS}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, **_SMALL}
_GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.25}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}
_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_SHORT = {"chunk_size": 8, "n_groups": 2, "num_heads": 8, "head_dim": 8, "state_size": 4}
_WIDE = {"head_dim": 8, **_ATTENTION}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"], **_HEADS}
_MOE = {"num_experts_per_tok": 1, "moe_intermediate_size": 16}
_LATENT = {
    **{"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1},
    **{"topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4, "num_local_experts": 2, **_MOE},
    **{"layer_types": _LINEAR["layer_types"], "mlp_layer_types": ["dense", "sparse"]},
}
_SWA = {
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 4},
    **{"d_rel": 4, "rel_extent": 16, "layer_types": ["hybrid_sliding", "hybrid"]},
}
FAMILIES = {
    "Mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 4, **_SMALL}, ["in_proj", "x_proj"]),
    "Mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {**_SHORT, **_SMALL}, ["in_proj"]),
    "FalconMamba": ("FalconMambaForCausalLM", "FalconMambaConfig", {"state_size": 4, **_SMALL}, ["in_proj", "x_proj"]),
    "Rwkv": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"attention_hidden_size": 32, **_SMALL},
        ["key", "value", "receptance"],
    ),
    "RecurrentGemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {**_ATTENTION, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16},
        ["gate_proj", "up_proj", "linear_x"],
    ),
    "Jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_ATTENTION,
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
            **{"num_experts": 2, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "use_mamba_kernels": False},
        },
        ["in_proj", "q_proj", "v_proj"],
    ),
    "Bamba": (
        "BambaForCausalLM",
        "BambaConfig",
        {**_ATTENTION, **_SSM, "attn_layer_indices": [1], "mamba_expand": 2},
        ["in_proj", "q_proj"],
    ),
    "Zamba": (
        "ZambaForCausalLM",
        "ZambaConfig",
        {
            **{**_ATTENTION, "num_key_value_heads": 4, "num_hidden_layers": 3, "attention_head_dim": 16},
            **{"layers_block_type": ["mamba", "hybrid", "hybrid"], "attention_hidden_size": 64},
            **{"mamba_d_state": 4, "mamba_dt_rank": 2},
        },
        ["in_proj", "q_proj"],
    ),
    "Zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **{**_ATTENTION, "num_key_value_heads": 4, "num_hidden_layers": 3, "attention_head_dim": 16},
            **{"layers_block_type": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1], "num_mem_blocks": 1},
            **{"mamba_d_state": 4, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "mamba_expand": 2},
            **{"chunk_size": 8, "use_mamba_kernels": False, "adapter_rank": 4, "use_shared_attention_adapter": False},
        },
        ["in_proj", "q_proj"],
    ),
    "FalconH1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {**_ATTENTION, **_SSM, "mamba_d_ssm": 64},
        ["in_proj", "q_proj", "down_proj"],
    ),
    "Lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {**_ATTENTION, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        ["in_proj", "q_proj", "w1"],
    ),
    "Qwen3Next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **{**_ATTENTION, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1},
            **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, **_HEADS},
            **{"layer_types": ["linear_attention", "full_attention"]},
        },
        ["in_proj_qkvz", "q_proj"],
    ),
    "Mistral, sliding": ("MistralForCausalLM", "MistralConfig", {**_ATTENTION, "sliding_window": 4}, "all-linear"),
    "Gemma3, sliding": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_ATTENTION, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        "all-linear",
    ),
    "OpenAIGPT": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT, ["c_attn", "c_fc"]),
    "XLM": (
        "XLMWithLMHeadModel",
        "XLMConfig",
        {
            **{"vocab_size": VOCAB, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
            **{"init_std": 0.25, "embed_init_std": 0.25, "causal": True, "pad_index": 0, "eos_index": 2},
            **{"bos_index": 1, "mask_token_id": 3},
        },
        ["q_lin", "lin1"],
    ),
    "XLNet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {
            **{"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "initializer_range": 0.25},
            **{"mem_len": 32, **TOKENS},
        },
        ["layer_1", "layer_2"],
    ),
    "CTRL": ("CTRLLMHeadModel", "CTRLConfig", {**_GPT, "dff": 48}, ["Wq", "Wv"]),
    "Reformer": (
        "ReformerModelWithLMHead",
        "ReformerConfig",
        {
            **{"vocab_size": VOCAB, "hidden_size": 32, "feed_forward_size": 48, "num_attention_heads": 2},
            **{"attention_head_size": 16, "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 4},
            **{"lsh_attn_chunk_length": 4, "num_buckets": 2, "axial_pos_shape": [8, 8], "hash_seed": 0},
            **{"axial_pos_embds_dim": [16, 16], "max_position_embeddings": 64, "is_decoder": True},
            **{"initializer_range": 0.25, "pad_token_id": 0, "eos_token_id": 2},
        },
        ["query", "value"],
    ),
    "CpmAnt": (
        "CpmAntForCausalLM",
        "CpmAntConfig",
        {
            **{"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48},
            **{"num_hidden_layers": 2, "prompt_length": 4, "prompt_types": 8, "segment_types": 8, "init_std": 0.25},
        },
        ["project_q", "project_v"],
    ),
    "BertGeneration": (
        "BertGenerationDecoder",
        "BertGenerationConfig",
        {**_SMALL, "intermediate_size": 48, "num_attention_heads": 4, "is_decoder": True},
        ["query", "value"],
    ),
    "OlmoHybrid": (
        "OlmoHybridForCausalLM",
        "OlmoHybridConfig",
        {**_ATTENTION, "num_key_value_heads": 4, **_LINEAR},
        ["q_proj", "up_proj"],
    ),
    "Qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**_WIDE, **_LINEAR}, ["in_proj_qkv", "q_proj"]),
    "Qwen3_5Moe": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {**_WIDE, **_LINEAR, "num_experts": 2, **_MOE, "shared_expert_intermediate_size": 16},
        ["in_proj_qkv", "q_proj"],
    ),
    "Qwen4Exp": (
        "Qwen4ExpForCausalLM",
        "Qwen4ExpTextConfig",
        {
            **{**_WIDE, **_LINEAR, "num_experts": 2, **_MOE, "shared_expert_intermediate_size": 16},
            **{"layer_types": ["linear_attention", "indexed_attention"], "hc_count": 2, "hc_lowrank": 4},
            **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
            **{"indexer_compress_ratio": 4},
        },
        ["in_proj_qkv", "q_proj"],
    ),
    "MiniMax": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {
            **{**_ATTENTION, "layer_types": _LINEAR["layer_types"], "block_size": 4},
            **{"num_local_experts": 2, "num_experts_per_tok": 1},
        },
        ["qkv_proj", "q_proj"],
    ),
    "GraniteMoeHybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **{**_ATTENTION, **_SSM, "mamba_expand": 2, "layer_types": ["mamba", "attention"]},
            **{"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 16},
        },
        ["in_proj", "q_proj"],
    ),
    "NemotronH": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **{**_WIDE, "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"], "n_groups": 1},
            **{"ssm_state_size": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "chunk_size": 8},
        },
        ["in_proj", "q_proj", "up_proj"],
    ),
    "Lfm2Moe": (
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {**_ATTENTION, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "num_experts": 2, **_MOE},
        ["in_proj", "q_proj", "w1"],
    ),
    "Lfm3": (
        "Lfm3ForCausalLM",
        "Lfm3Config",
        {**_WIDE, "layer_types": ["conv", "full_attention"]},
        ["in_proj", "q_proj", "w1"],
    ),
    "KimiLinear": (
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {**_ATTENTION, **_LATENT, "q_lora_rank": 8, "linear_head_dim": 8, "linear_num_heads": 4},
        ["q_proj", "o_proj", "up_proj"],
    ),
    "BailingHybrid": (
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        {**_WIDE, **_LATENT},
        ["q_proj", "o_proj", "up_proj"],
    ),
    "Inkling": (
        "InklingForCausalLM",
        "InklingTextConfig",
        {
            **{**_WIDE, **_SWA, **_MOE, "n_routed_experts": 2, "n_shared_experts": 1},
            **{"mlp_layer_types": ["dense", "sparse"], "logits_mup_width_multiplier": 1.0},
        },
        ["q_proj", "o_proj"],
    ),
    "Inkling2": (
        "Inkling2ForCausalLM",
        "Inkling2TextConfig",
        {
            **_WIDE,
            **_SWA,
            **_MOE,
            "n_routed_experts": 2,
            "unpadded_vocab_size": VOCAB,
            "n_layers_per_attn_res_block": 1,
        },
        ["q_proj", "o_proj"],
    ),
    "Zaya": (
        "ZayaForCausalLM",
        "ZayaConfig",
        {**_WIDE, "router_hidden_size": 16, "num_experts": 2, **_MOE},
        ["q_proj", "o_proj"],
    ),
    "DeepseekV4": (
        "DeepseekV4ForCausalLM",
        "DeepseekV4Config",
        {
            **{**_SMALL, **_MOE, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8},
            **{"n_routed_experts": 2, "n_shared_experts": 1, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2},
            **{"index_n_heads": 2, "index_head_dim": 8, "index_topk": 8, "sliding_window": 8, "hc_mult": 2},
        },
        ["q_a_proj", "q_b_proj", "kv_proj", "o_b_proj"],
    ),
}

# What transformers itself cannot do with a plain model of these families, or what does not apply there.
REMEMBERS_NOTHING = {"OpenAIGPT", "XLM"}  # no cache at all: every call reads the whole text
READS_WHOLE = {"CpmAnt"}  # a call on a cache is given the whole text; a plain model's answer changes on a begun cache
REMEMBERS_INSIDE = {"RecurrentGemma"}  # the state is in the model's modules, so a loop needs prompt.using
OWN_STATE = {"Rwkv", "XLNet", "Reformer", *REMEMBERS_NOTHING, *REMEMBERS_INSIDE}  # no Cache can be given
REHASHES = {"Reformer"}  # its hashes of a row depend on the batch
NO_BEAMS = {"Rwkv": "its state cannot be reordered"}
NOT_BUILT = {"xLSTM": "transformers' own generate fails on a CPU with a tiny configuration (shape of matC_old)"}


ALONE = {"Gemma4Assistant", "Gemma4UnifiedAssistant"}  # have no answers of their own: another model's assistants
_RECURRENT = re.compile("update_recurrent_state|update_conv_state|has_previous_state|_is_stateful = True")


def families_of_transformers():
    """The names of all causal language models whose files show a recurrent state, or no keys and values."""
    found, root = set(), Path(transformers.__file__).parent / "models"
    for kind, named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for file in (root / model_type_to_module_name(kind)).glob("modeling_*.py"):
            source = file.read_text(encoding="utf-8")
            if f"class {named}(" in source and (_RECURRENT.search(source) or "past_key_values" not in source):
                found.add(re.sub("ForCausalLM|LMHeadModel", "", named))
    return found


def cache_of(name, model):
    """An empty cache of the class that a family uses."""
    return MiniMaxCache() if name == "MiniMax" else DynamicCache(config=model.config)


def family(name, root):
    """A tiny model of a family with three experts."""
    model, config, settings, targets = FAMILIES[name]
    return World(build(getattr(transformers, model), getattr(transformers, config)(**settings)), root, targets)
