"""Composed models of many families, tiny and random: equal to PEFT's, in three dtypes, generating and padded."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from models import SIZES, TEXT, TOKENS, VOCAB, build, close, greedy, peft_library, peft_model, tokens
from spectr import ExpertLibrary, Lag, Oracle, Seqr, Spectr, compose, trace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANKS = {"ants": 4, "bees": 4, "cats": 2, "dogs": 8}
GROUPED = {**TEXT, **TOKENS, "num_key_value_heads": 2}
ids = tokens(batch=2, length=7)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model class and its tiny configuration.

    Attributes:
        model: Name of the class in transformers.
        config: Name of its configuration's class.
        settings: Of the configuration.
        layers: How many linear layers an adapter of ``targets`` adapts.
        targets: PEFT's target modules.
        options: More of PEFT's LoRA settings.
        kind: What it is given: "causal", "seq2seq" or "image".
    """

    model: str
    config: str
    settings: dict[str, Any]
    layers: int
    targets: Any = "all-linear"
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "causal"

    def build(self) -> nn.Module:
        import transformers

        return build(getattr(transformers, self.model), getattr(transformers, self.config)(**self.settings))


FAMILIES = {
    "llama": Family(model="LlamaForCausalLM", config="LlamaConfig", settings=GROUPED, layers=14),
    "mistral": Family(model="MistralForCausalLM", config="MistralConfig", settings=GROUPED, layers=14),
    "qwen3": Family(model="Qwen3ForCausalLM", config="Qwen3Config", settings={**GROUPED, "head_dim": 8}, layers=14),
    "gemma": Family(model="GemmaForCausalLM", config="GemmaConfig", settings={**GROUPED, "head_dim": 8}, layers=14),
    "gemma2": Family(model="Gemma2ForCausalLM", config="Gemma2Config", settings={**GROUPED, "head_dim": 8}, layers=14),
    "gemma3": Family(
        model="Gemma3ForCausalLM", config="Gemma3TextConfig", settings={**GROUPED, "head_dim": 8}, layers=14
    ),
    "phi3": Family(
        model="Phi3ForCausalLM",
        config="Phi3Config",
        settings=GROUPED,
        targets=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        layers=8,
    ),
    "gpt2": Family(
        model="GPT2LMHeadModel",
        config="GPT2Config",
        settings={"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, **TOKENS}
        | {"initializer_range": 0.25},
        targets=["c_attn", "c_proj", "c_fc"],
        options={"fan_in_fan_out": True},
        layers=8,
    ),
    "gpt-neox": Family(
        model="GPTNeoXForCausalLM", config="GPTNeoXConfig", settings={**TEXT, **TOKENS, "rotary_pct": 0.5}, layers=8
    ),
    "t5": Family(
        model="T5ForConditionalGeneration",
        config="T5Config",
        settings={"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "initializer_factor": 1.0},
        targets=["q", "k", "v", "o", "wi", "wo"],
        kind="seq2seq",
        layers=32,
    ),
    "vit": Family(
        model="ViTForImageClassification",
        config="ViTConfig",
        settings={**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 5, "initializer_range": 0.25},
        targets=r".*encoder.*|.*layers?\..*(proj|query|key|value|dense|fc\d)",
        kind="image",
        layers=12,
    ),
}
TEXTS = [name for name, family in FAMILIES.items() if family.kind != "image"]
CAUSAL = [name for name, family in FAMILIES.items() if family.kind == "causal"]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> Callable[[str], ExpertLibrary]:
    """Each family's experts, made by PEFT when first asked for."""
    made: dict[str, ExpertLibrary] = {}

    def library(name: str) -> ExpertLibrary:
        if name not in made:
            family = FAMILIES[name]
            root = tmp_path_factory.mktemp(name)
            made[name] = peft_library(family.build(), root, RANKS, targets=family.targets, **family.options)
        return made[name]

    return library


@torch.no_grad()
def forward(model, kind, **inputs):
    if kind == "image":
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        inputs = {"pixel_values": pixels.to(next(model.parameters()).dtype)}
    else:
        inputs = {"input_ids": ids, **inputs}
    if kind == "seq2seq":
        inputs = {"decoder_input_ids": ids[:, :3], **inputs}
    return model(**inputs).logits.float()


def routed(name, libraries, router=None, dtype=torch.float32):
    model = FAMILIES[name].build().to(dtype)
    return model, compose(model, libraries(name), router or Spectr(top_k=2))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_oracle_is_pefts_model(name, libraries):
    family, folder = FAMILIES[name], libraries(name)["bees"].origin
    plain = family.build()
    theirs = forward(peft_model(plain, folder), family.kind)
    assert (theirs - forward(plain, family.kind)).abs().max() > 0.05 * theirs.abs().max()
    model, _ = routed(name, libraries, Oracle(expert="bees"))
    close(forward(model, family.kind), theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_in_half_precision_the_oracle_is_as_exact_as_pefts_model(name, libraries, dtype):
    """Both err, against the model in float32; ours by no more than twice what PEFT's does."""
    family, folder = FAMILIES[name], libraries(name)["bees"].origin
    truth = forward(peft_model(family.build(), folder), family.kind)
    theirs = forward(peft_model(family.build().to(DTYPES[dtype]), folder), family.kind)
    model, _ = routed(name, libraries, Oracle(expert="bees"), DTYPES[dtype])
    ours = forward(model, family.kind)
    allowed = 2 * (theirs - truth).norm() + torch.finfo(DTYPES[dtype]).eps * truth.norm()
    assert (ours - truth).norm() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_adapted_layer_is_routed_and_removed_again(name, libraries, dtype):
    family = FAMILIES[name]
    model, handle = routed(name, libraries, dtype=DTYPES[dtype])
    assert set(handle.layers) == set(libraries(name)["ants"].shapes)
    assert len(handle.layers) == family.layers
    with trace(model) as record:
        out = forward(model, family.kind)
    assert torch.isfinite(out).all()
    assert {layer.A_PI.dtype for layer in handle.layers.values()} == {DTYPES[dtype]}
    for layer in record.values():
        assert ((layer.weights > 0).sum(-1) == 2).all()
        torch.testing.assert_close(layer.weights.sum(-1), torch.ones(layer.weights.shape[:2]))
    plain = forward(family.build().to(DTYPES[dtype]), family.kind)
    assert torch.equal(forward(handle.remove(), family.kind), plain)


@pytest.mark.parametrize("name", TEXTS)
def test_generation_is_the_same_with_and_without_a_cache(name, libraries):
    model, _ = routed(name, libraries)
    cached = greedy(model, ids, new=5)
    assert torch.equal(cached, greedy(model, ids, new=5, use_cache=False))
    if FAMILIES[name].kind == "causal":
        stepwise = forward(model, "causal", input_ids=cached[:, :-1])[:, 6:]
        stepwise[..., TOKENS["eos_token_id"]] = -torch.inf  # as min_new_tokens does
        assert torch.equal(stepwise.argmax(-1), cached[:, 7:])


@pytest.mark.parametrize("name", TEXTS)
def test_sampling_is_reproducible_by_its_seed(name, libraries):
    model, _ = routed(name, libraries)
    outs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outs.append(greedy(model, ids, new=6, do_sample=True, temperature=5.0, top_k=0))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("name", TEXTS)
def test_beam_search_finds_what_it_finds_without_a_cache(name, libraries):
    model, _ = routed(name, libraries)
    beams = greedy(model, ids, new=4, num_beams=3)
    assert beams.shape[0] == 2
    assert torch.equal(beams, greedy(model, ids, new=4, num_beams=3, use_cache=False))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXTS)
def test_padding_leaves_the_logits_of_the_tokens_alone(name, libraries, side):
    family = FAMILIES[name]
    model, _ = routed(name, libraries)
    pad = torch.zeros(1, 3, dtype=torch.long)
    short = torch.cat([pad, ids[:1, :4]] if side == "left" else [ids[:1, :4], pad], dim=1)
    real = short != 0
    batch, mask = torch.cat([short, ids[1:]]), torch.cat([real, torch.ones_like(real)]).long()
    inputs = {"input_ids": batch, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = forward(model, family.kind, **inputs)
    if family.kind == "seq2seq":
        alone = forward(model, family.kind, input_ids=ids[:1, :4], decoder_input_ids=ids[:1, :3])
        close(padded[0], alone[0])
    else:
        close(padded[0][real[0]], forward(model, family.kind, input_ids=ids[:1, :4])[0])
    full = {"decoder_input_ids": ids[1:, :3]} if family.kind == "seq2seq" else {}
    close(padded[1], forward(model, family.kind, input_ids=ids[1:], **full)[0])


def test_composing_leaves_the_weights_of_the_base_alone(libraries):
    for name, family in FAMILIES.items():
        plain = family.build()
        before = copy.deepcopy(plain.state_dict())
        compose(plain, libraries(name), Spectr(top_k=2))
        forward(plain, family.kind)
        after = plain.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)


FAMILY = [
    Lag(shortlist=2, top_k=1),
    Seqr(),
    Spectr(top_k=2, combine="ties:density=0.5"),
    Spectr(top_k=2, combine="dare-ties"),
    Spectr(top_k=2, combine="knots"),
]


@pytest.mark.parametrize("router", FAMILY, ids=str)
@pytest.mark.parametrize("name", TEXTS)
def test_the_family_routes_decoders_and_encoder_decoders(name, libraries, router):
    family = FAMILIES[name]
    model, handle = routed(name, libraries, router)
    with trace(model) as record:
        out = forward(model, family.kind)
    plain = forward(family.build(), family.kind)
    assert (out - plain).abs().max() > 1e-3
    for layer in record.values():
        assert ((layer.weights > 0).sum(-1) == router.top_k).all()
    assert torch.equal(greedy(model, ids, new=5), greedy(model, ids, new=5, use_cache=False))
    assert torch.equal(forward(handle.remove(), family.kind), plain)
