"""Families of transformers' models, tiny and random, built from their configurations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models import SIZES, TEXT, TOKENS, VOCAB, build

GROUPED = {**TEXT, **TOKENS, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
MOE = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, "initializer_range": 0.25}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "init_std": 0.25}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCAB}
BART |= {"max_position_embeddings": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None, **TOKENS}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "initializer_factor": 1.0}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
OPT |= {"max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.25, **TOKENS}
JETMOE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2, **TOKENS}
JETMOE |= {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCAB}
REFORMER = {"attention_head_size": 8, "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "hidden_size": 32}
REFORMER |= {"feed_forward_size": 48, "num_attention_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 64}
REFORMER |= {"is_decoder": True, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2}
REFORMER |= {"hash_seed": 0, "use_cache": False, **TOKENS}
DEEPSEEK = {**MOE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1}
DEEPSEEK |= {"topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
DEEPSEEK |= {"v_head_dim": 8, "first_k_dense_replace": 1}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
MAMBA = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": VOCAB, "time_step_rank": 4, **TOKENS}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model class and its tiny configuration.

    Attributes:
        model: Name of the class in transformers.
        config: Name of its configuration's class.
        settings: Of the configuration.
        targets: PEFT's target modules of a full adapter.
        plain: PEFT's target modules of a plain one: attention's queries and values, or what there is.
        options: More of PEFT's LoRA settings.
        kind: What it is given: "causal", "seq2seq", "encoder" or "image".
        pixels: Width of an image.
    """

    model: str
    config: str
    settings: dict[str, Any]
    targets: Any = "all-linear"
    plain: Any = ("q_proj", "v_proj")
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "causal"
    pixels: int = 16

    def build(self) -> nn.Module:
        import transformers

        return build(getattr(transformers, self.model), getattr(transformers, self.config)(**self.settings))

    def inputs(self, rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
        """What it is called with; each row differs."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "image":
            return {"pixel_values": torch.randn(rows, 3, self.pixels, self.pixels, generator=generator)}
        given = {"input_ids": torch.randint(3, VOCAB, (rows, length), generator=generator)}
        if self.kind == "seq2seq":
            given["decoder_input_ids"] = torch.randint(3, VOCAB, (rows, 3), generator=generator)
        return given


FAMILIES = {
    "llama": Family(model="LlamaForCausalLM", config="LlamaConfig", settings=GROUPED),
    "mistral": Family(model="MistralForCausalLM", config="MistralConfig", settings=GROUPED),
    "qwen2": Family(model="Qwen2ForCausalLM", config="Qwen2Config", settings=GROUPED),
    "qwen3": Family(model="Qwen3ForCausalLM", config="Qwen3Config", settings=HEADS),
    "gemma": Family(model="GemmaForCausalLM", config="GemmaConfig", settings=HEADS),
    "gemma2": Family(model="Gemma2ForCausalLM", config="Gemma2Config", settings=HEADS),
    "gemma3": Family(model="Gemma3ForCausalLM", config="Gemma3TextConfig", settings=HEADS),
    "phi": Family(model="PhiForCausalLM", config="PhiConfig", settings=GROUPED),
    "phi3": Family(model="Phi3ForCausalLM", config="Phi3Config", settings=GROUPED, plain=("qkv_proj", "o_proj")),
    "olmo2": Family(model="Olmo2ForCausalLM", config="Olmo2Config", settings=GROUPED),
    "cohere": Family(model="CohereForCausalLM", config="CohereConfig", settings=GROUPED),
    "granite": Family(model="GraniteForCausalLM", config="GraniteConfig", settings=GROUPED),
    "stablelm": Family(model="StableLmForCausalLM", config="StableLmConfig", settings=GROUPED),
    "starcoder2": Family(model="Starcoder2ForCausalLM", config="Starcoder2Config", settings=GROUPED),
    "gpt2": Family(
        model="GPT2LMHeadModel",
        config="GPT2Config",
        settings={**GPT2, **TOKENS},
        targets=["c_attn", "c_proj", "c_fc"],
        plain=("c_attn",),
        options={"fan_in_fan_out": True},
    ),
    "gpt-neox": Family(
        model="GPTNeoXForCausalLM",
        config="GPTNeoXConfig",
        settings={**TEXT, **TOKENS, "rotary_pct": 0.5},
        plain=("query_key_value",),
    ),
    "gptj": Family(model="GPTJForCausalLM", config="GPTJConfig", settings={**GPT2, "rotary_dim": 4, **TOKENS}),
    "falcon": Family(
        model="FalconForCausalLM", config="FalconConfig", settings={**TEXT, **TOKENS}, plain=("query_key_value",)
    ),
    "bloom": Family(
        model="BloomForCausalLM",
        config="BloomConfig",
        settings={
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": VOCAB,
            "initializer_range": 0.25,
            **TOKENS,
        },
        plain=("query_key_value",),
    ),
    "opt": Family(model="OPTForCausalLM", config="OPTConfig", settings=OPT),
    "xlnet": Family(
        model="XLNetLMHeadModel",
        config="XLNetConfig",
        settings={
            "d_model": 32,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 48,
            "vocab_size": VOCAB,
            "initializer_range": 0.25,
        }
        | TOKENS,
        plain=("layer_1",),
    ),
    "reformer": Family(
        model="ReformerModelWithLMHead",
        config="ReformerConfig",
        settings=REFORMER,
        plain=("value", "query_key", "query"),
    ),
    "mamba": Family(
        model="MambaForCausalLM",
        config="MambaConfig",
        settings=MAMBA,
        targets=["in_proj", "x_proj"],
        plain=("in_proj",),
    ),
    "mixtral": Family(model="MixtralForCausalLM", config="MixtralConfig", settings={**GROUPED, "num_local_experts": 4}),
    "qwen2-moe": Family(
        model="Qwen2MoeForCausalLM",
        config="Qwen2MoeConfig",
        settings={**MOE, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "jetmoe": Family(model="JetMoeForCausalLM", config="JetMoeConfig", settings=JETMOE, plain=("kv_proj",)),
    "deepseek-v3": Family(
        model="DeepseekV3ForCausalLM",
        config="DeepseekV3Config",
        settings=DEEPSEEK,
        plain=("q_b_proj", "kv_b_proj"),
    ),
    "jamba": Family(
        model="JambaForCausalLM",
        config="JambaConfig",
        settings={**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        | {"expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
        targets=["q_proj", "v_proj", "in_proj", "x_proj", "out_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "t5": Family(model="T5ForConditionalGeneration", config="T5Config", settings=T5, plain=("q", "v"), kind="seq2seq"),
    "bart": Family(model="BartForConditionalGeneration", config="BartConfig", settings=BART, kind="seq2seq"),
    "led": Family(
        model="LEDForConditionalGeneration",
        config="LEDConfig",
        settings={**BART, "attention_window": 4, "max_encoder_position_embeddings": 64}
        | {"max_decoder_position_embeddings": 64},
        plain=("query", "value", "q_proj", "v_proj"),
        kind="seq2seq",
    ),
    "bert": Family(
        model="BertModel", config="BertConfig", settings={**TEXT, **TOKENS}, plain=("query", "value"), kind="encoder"
    ),
    "longformer": Family(
        model="LongformerModel",
        config="LongformerConfig",
        settings={**TEXT, **TOKENS, "attention_window": 4},
        plain=("query", "value"),
        kind="encoder",
    ),
    "vit": Family(
        model="ViTForImageClassification",
        config="ViTConfig",
        settings={**VISION, "num_labels": 5, "initializer_range": 0.25},
        targets=r".*encoder.*|.*layers?\..*(proj|query|key|value|dense|fc\d)",
        plain=r".*(query|value|q_proj|v_proj)",
        kind="image",
    ),
    "swin": Family(
        model="SwinForImageClassification",
        config="SwinConfig",
        settings={**SWIN, "num_labels": 5},
        plain=r".*(query|value|q_proj|v_proj)",
        kind="image",
    ),
}
