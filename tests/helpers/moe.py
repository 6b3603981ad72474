"""Tiny mixtures of experts with fused parameters, and adapters of these made by PEFT."""

from __future__ import annotations

from pathlib import Path

import transformers
from torch import nn

from models import TEXT, TOKENS, build, peft_adapter

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "Qwen3Moe": {**_MOE, "head_dim": 8},
    "Mixtral": _LOCAL,
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "GptOss": {**_LOCAL, "intermediate_size": 16},  # transposed, interleaved, with biases
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def tiny_moe(family: str = "Qwen3Moe", **changes) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**{**TEXT, **TOKENS, **FAMILIES[family], **changes})
    return build(getattr(transformers, f"{family}ForCausalLM"), config)


def moe_adapter(model: nn.Module, folder: Path, seed: int, parameters=EXPERTS, targets=(), **config) -> Path:
    return peft_adapter(
        model, folder, seed, targets=list(targets), target_parameters=list(parameters), lora_dropout=0.0, **config
    )
