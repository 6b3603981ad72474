"""Composed models of many families, tiny and random: equal to PEFT's, in half precision, generating and padded."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch

import families
from models import TOKENS, close, greedy, peft_library, peft_model, tokens
from spectr import ExpertLibrary, Lag, Oracle, Seqr, Spectr, compose, trace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANKS = {"ants": 4, "bees": 4, "cats": 2, "dogs": 8}
ids = tokens(batch=2, length=7)
# By family how many layers an adapter of all linear ones adapts.
LAYERS = {"llama": 14, "mistral": 14, "qwen3": 14, "gemma": 14, "gemma2": 14, "gemma3": 14, "phi3": 8, "gpt2": 8}
LAYERS |= {"gpt-neox": 8, "t5": 32, "vit": 12}
FAMILIES = {name: families.FAMILIES[name] for name in LAYERS}
TEXTS = [name for name, family in FAMILIES.items() if family.kind != "image"]


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
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        inputs = {"pixel_values": pixels.to(next(model.parameters()).dtype)}
    else:
        inputs = {"input_ids": ids, **inputs}
    if kind == "seq2seq":
        inputs = {"decoder_input_ids": ids[:, :3], **inputs}
    return model(**inputs).logits.float()


def routed(name, libraries, router=None, dtype=torch.float32):
    model = FAMILIES[name].build().to(dtype)
    return model, compose(model, libraries(name), router or Spectr(top_k=2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_in_half_precision_the_oracle_is_as_exact_as_pefts_model(name, libraries, dtype):
    """Both err, against the model in float32; ours by at most twice as much as PEFT's."""
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
    assert len(handle.layers) == LAYERS[name]
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
