"""Adapters for the tests: written by hand where a file has to be wrong, by PEFT where PEFT is the judge."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spectr.errors import SpectrError

MODULES = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.self_attn.v_proj": (8, 4)}


def factors(rank: int = 2, seed: int = 0, modules: Mapping[str, tuple[int, int]] = MODULES) -> dict[str, Tensor]:
    """Random factors under PEFT's names, for modules given as ``{name: (inputs, outputs)}``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (inputs, outputs) in modules.items():
        tensors[key_A(module)] = torch.randn(rank, inputs, generator=generator)
        tensors[key_B(module)] = torch.randn(outputs, rank, generator=generator)
    return tensors


def key_A(module: str) -> str:
    return f"base_model.model.{module}.lora_A.weight"


def key_B(module: str) -> str:
    return f"base_model.model.{module}.lora_B.weight"


def write_adapter(
    folder: Path, *, rank: int = 2, seed: int = 0, tensors: Mapping[str, Tensor] | None = None, **config: Any
) -> Path:
    """A PEFT folder written by hand; ``config`` is laid over a plain LoRA configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "base_model_name_or_path": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps({**whole, **config}), encoding="utf-8")
    save_file(dict(factors(rank, seed) if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder


def tree(folder: Path) -> dict[str, str]:
    """What a folder holds, at any depth: SHA-256 of files by relative path. The lock is not content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def assert_says(error: SpectrError, *, given: tuple[str, ...], expected: str | None, do: str | None) -> None:
    """The three parts of an error: ``given`` contains each phrase; the others contain theirs, or are absent."""
    for phrase in given:
        assert phrase in error.given
    for part, phrase in ((error.expected, expected), (error.do, do)):
        assert (part is None) == (phrase is None), f"{part!r} is not about {phrase!r}"
        assert phrase is None or (phrase in str(part) and phrase in str(error))


@contextmanager
def of_others():
    """Warnings of PEFT and transformers about themselves are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tiny_llama(seed: int = 0):
    """A random Llama of two layers, with grouped heads so that no two projections are alike."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return _random(LlamaForCausalLM, config, seed)


def tiny_gpt2(seed: int = 0):
    """A random GPT-2 of one layer, whose linear layers are transposed ``Conv1D``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=17, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return _random(GPT2LMHeadModel, config, seed)


def _random(kind, config, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval()


def save_with_peft(folder: Path, model, config, *, trained: bool = True, seed: int = 0, **saving: Any) -> Path:
    """Wrap ``model`` with PEFT, fill every adapter weight with noise where it is to look trained, and save."""
    from peft import get_peft_model

    with of_others():
        wrapped = get_peft_model(model, config)
        if trained:
            generator = torch.Generator().manual_seed(seed)
            for weight in (p for p in wrapped.parameters() if p.requires_grad):
                weight.data.normal_(generator=generator)
        wrapped.save_pretrained(str(folder), **saving)
    return folder


def load_with_peft(folder: Path, model):
    """PEFT's own reading of a folder."""
    from peft import PeftModel

    with of_others():
        return PeftModel.from_pretrained(model, str(folder)).eval()


def peft_layers(wrapped) -> dict[str, Any]:
    """PEFT's LoRA layers, by the name their module has in the bare model."""
    layers = ((name, module) for name, module in wrapped.named_modules() if hasattr(module, "get_delta_weight"))
    return {name.removeprefix("base_model.model."): module for name, module in layers}
