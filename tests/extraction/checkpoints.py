"""Tiny checkpoints on disk: a base, and the same one with a known change in its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import build, logits, peft_model, tiny_llama, tokens
from spectr.extraction import Extraction, Report, extract

Change = Callable[[str, Tensor], Tensor | None]


def tiny_gpt2(**changes) -> nn.Module:
    """A GPT-2 of two layers with its tied head; its layers are transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, **changes
    )
    return build(GPT2LMHeadModel, config)


def low_rank(rank: int, *, outputs: int, inputs: int, seed: int, scale: float = 0.1) -> Tensor:
    """A random matrix of that rank."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(outputs, rank, generator=generator), torch.randn(rank, inputs, generator=generator)
    return scale * left @ right / rank**0.5


def linear_change(rank: int | None, skip: str = "lm_head") -> Change:
    """A change of known rank (full where ``None``) of every linear layer's weight, a different one in each."""

    def change(name: str, weight: Tensor) -> Tensor | None:
        if weight.ndim != 2 or skip in name or any(part in name for part in ("embed", "wte", "wpe")):
            return None
        outputs, inputs = weight.shape
        return low_rank(rank or min(outputs, inputs), outputs=outputs, inputs=inputs, seed=sum(map(ord, name)))

    return change


def save_pair(root: Path, model: nn.Module, change: Change, **saving) -> tuple[Path, Path, dict[str, Tensor]]:
    """The folders ``base`` and ``tuned``, and the changes by parameter name; the model becomes the tuned one."""
    model.save_pretrained(root / "base")
    changes = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            delta = change(name, weight)
            if delta is not None:
                weight.add_(delta)
                changes[name] = delta
    model.save_pretrained(root / "tuned", **saving)
    return root / "base", root / "tuned", changes


def take(base: Path, tuned: Path, out: Path, **settings) -> Report:
    """Extract with float32 factors by default."""
    return extract(tuned, base, out, Extraction(**{"dtype": "float32", **settings}))


def updates(expert: Path) -> dict[str, Tensor]:
    """``B @ A`` (outputs, inputs) in float64 by module, from the file alone; the scale has to be 1."""
    config = json.loads((expert / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    tensors = load_file(expert / "adapter_model.safetensors")
    modules = [key.split(".lora_A")[0] for key in tensors if ".lora_A" in key]
    return {
        module.removeprefix("base_model.model."): tensors[f"{module}.lora_B.weight"].double()
        @ tensors[f"{module}.lora_A.weight"].double()
        for module in modules
    }


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Change the tensors of a checkpoint of one file."""
    path = folder / "model.safetensors"
    tensors = dict(edit({name: tensor.clone() for name, tensor in load_file(path).items()}))
    save_file(tensors, path, metadata={"format": "pt"})


def same_logits(base: Path, tuned: nn.Module, expert: Path, tolerance: float = 1e-5) -> None:
    """PEFT's model of base and expert answers as the fine-tuned model does."""
    ids = tokens()
    found, wanted = logits(peft_model(load(base), expert), ids), logits(tuned, ids)
    assert (found - logits(load(base), ids)).abs().max() > 100 * tolerance * wanted.abs().max()
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def load(folder: Path) -> nn.Module:
    """The model in a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


__all__ = ["load", "low_rank", "rewrite", "same_logits", "save_pair", "take", "tiny_gpt2", "tiny_llama", "updates"]
