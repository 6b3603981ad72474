"""Tiny random models and adapters, and dense float64 updates of adapters, read without spectr."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectr import ExpertLibrary

VOCAB = 61
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.25}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
Pair = tuple[Tensor, Tensor]


def tiny_llama(seed: int = 0, **changes: Any) -> nn.Module:
    """A Llama of two layers, float32, in eval mode; its logits are of the order of one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**TEXT, **TOKENS, "num_key_value_heads": 2, **changes})
    return build(LlamaForCausalLM, config, seed)


def build(model_class: type, config: Any, seed: int = 0) -> nn.Module:
    """A model with random weights that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config).eval()


def tokens(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_factors(rank: int, inputs: int, outputs: int, seed: int, gap: bool = False) -> Pair:
    """``A`` (rank, inputs) and ``B`` (outputs, rank), float32, whose update of a random token is of the token's size.

    Args:
        rank: At most the smaller of the sizes where a gap is asked for.
        inputs: Columns of A.
        outputs: Rows of B.
        seed: Of the random numbers.
        gap: Make the first singular value five times the second, so that power iterations converge.
    """
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, inputs, generator=generator) / inputs**0.5
    B = torch.randn(outputs, rank, generator=generator) / rank**0.5
    if gap:
        A, B = torch.linalg.qr(A.T)[0].T, torch.linalg.qr(B)[0]
        B = B * torch.tensor([1.0] + [0.2 / (1 + i) for i in range(rank - 1)])
    return A.contiguous(), B.contiguous()


def write_adapter(folder: Path, factors: Mapping[str, Pair], alpha: float = 16, **config: Any) -> Path:
    """An adapter folder written by hand; all factors need the rank of the first, or a ``rank_pattern``."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (A, B) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(iter(factors.values()))[0].shape[0]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(factors), **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@contextmanager
def types_unchecked() -> Iterator[None]:
    """Without the type checks that the tests put around spectr's functions: as a user runs them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@contextmanager
def peft_on_new_transformers() -> Iterator[None]:
    """PEFT reads an attribute that transformers deprecates, and warns of patterns that it has made itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield


def peft_adapter(
    model: nn.Module, folder: Path, seed: int, *, rank: int = 4, targets: Any = "all-linear", gap=False, **config: Any
) -> Path:
    """An adapter with random factors, made and saved by PEFT itself; the model stays as it is."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, target_modules=targets, **{"lora_alpha": 2 * rank, **config})
    with peft_on_new_transformers():
        wrapped = get_peft_model(copy.deepcopy(model), settings)
    for number, layer in enumerate(m for m in wrapped.modules() if hasattr(m, "lora_A")):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        fresh = random_factors(A.shape[0], A.shape[1], B.shape[0], 1000 * seed + number, gap)
        with torch.no_grad():
            A.copy_(fresh[0])
            B.copy_(0.5 * fresh[1])
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_library(model: nn.Module, root: Path, ranks: Mapping[str, int], **options: Any) -> ExpertLibrary:
    """A library of adapters made by :func:`peft_adapter`, in ``root/NAME``, one seed each."""
    for seed, (name, rank) in enumerate(sorted(ranks.items()), start=1):
        peft_adapter(model, root / name, seed, rank=rank, **options)
    return ExpertLibrary.open(root)


def peft_model(model: nn.Module, folder: Path) -> nn.Module:
    """PEFT's own model with one adapter, on a copy of the base model."""
    from peft import PeftModel

    with peft_on_new_transformers():
        return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def peft_deltas(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """By module name what PEFT would add to the module's weight, in the weight's own layout."""
    wrapped = peft_model(model, folder)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in wrapped.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def dense_deltas(folder: Path) -> dict[str, Tensor]:
    """``alpha / r * B @ A`` (outputs, inputs) in float64 by module name, from the files of a plain adapter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    factors = load_file(folder / "adapter_model.safetensors")
    modules = {key.split(".lora_")[0] for key in factors}
    scale = config["lora_alpha"] / config["r"]
    return {
        module.removeprefix("base_model.model."): scale
        * (factors[f"{module}.lora_B.weight"].double() @ factors[f"{module}.lora_A.weight"].double())
        for module in modules
    }


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of a batch."""
    return model(input_ids=ids, **inputs).logits


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Assert that no entry differs by more than ``tolerance`` times the largest of ``theirs``."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.detach().abs().max()))


def identities(model: nn.Module) -> dict[str, int]:
    """Which object stands under which module name."""
    return {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}


def greedy(model: nn.Module, ids: Tensor, new: int = 5, **options: Any) -> Tensor:
    """Greedy continuation of exactly ``new`` tokens."""
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
