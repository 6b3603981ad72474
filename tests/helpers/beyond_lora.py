"""Adapters whose updates are more than two factors, made and saved by PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters_on_disk import of_others
from models import TEXT, TOKENS, build

KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "DoRA with rsLoRA": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "lora_only": {"bias": "lora_only"},
    "DoRA with trained biases": {"use_dora": True, "bias": "lora_only"},
}
TARGETS = ["q_proj", "v_proj"]


def tiny_qwen(**changes: Any) -> nn.Module:
    """A Qwen2 of two layers, whose q, k and v projections have biases that are not zero."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = build(Qwen2ForCausalLM, Qwen2Config(**{**TEXT, **TOKENS, "num_key_value_heads": 2, **changes}))
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return model


def moved_adapter(model: nn.Module, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter whose trained parameters all differ from their initial values; the model stays as it is."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **config}
    with of_others():
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    plain = config.get("init_lora_weights", True) is True
    for name, weight in wrapped.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "magnitude" in name:
            weight.data *= 1 + 0.3 * noise.clamp(-2, 2)
        elif weight.requires_grad and weight.ndim == 2 and plain:
            weight.data = noise / weight.shape[-1] ** 0.5
        elif weight.requires_grad:
            weight.data += 0.2 * noise * (weight.data.std() if weight.ndim == 2 else 1)
    with of_others():
        wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder
