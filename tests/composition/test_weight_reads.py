"""Layers whose weights a model uses without calling them: found, and experts there left out or refused."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from composing import module_adapter
from torch import nn

from models import SIZES, TEXT, TOKENS, VOCAB, build, close, greedy, peft_adapter, peft_model, tokens, types_unchecked
from spectr import Calibrated, ExpertLibrary, Oracle, Spectr, compose, trace
from spectr.composition.find_weight_reads import find_weight_reads
from spectr.errors import CompositionError
from spectr.layers.weight_reads import WeightReads
from trained_modules import ROWS

ids = tokens(batch=2, length=5)
STATE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "state_size": 4, **TOKENS}
SPEECH = {**SIZES, "vocab_size": VOCAB, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16}
SPEECH |= {"num_conv_pos_embedding_groups": 4}
TARGETS = ["in_proj", "x_proj", "dt_proj"]
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
SLOW = {"pretraining_tp": 2, "slow_but_exact": True}
MOBILE = {**SIZES, "vocab_size": VOCAB, "embedding_size": 16, "intra_bottleneck_size": 16}
HYBRID = {
    "num_key_value_heads": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "num_experts": 2,
}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
FOUND = {  # by model: its configuration, settings, and how the names of the layers end
    "LlamaForCausalLM": ("LlamaConfig", {**TEXT, **TOKENS, "tie_word_embeddings": True}, set()),
    "T5ForConditionalGeneration": ("T5Config", {**T5, "decoder_start_token_id": 0}, set()),  # reads wo.weight.dtype
    "MambaForCausalLM": ("MambaConfig", STATE, {"dt_proj"}),
    "FalconMambaForCausalLM": ("FalconMambaConfig", STATE, {"dt_proj"}),
    "JambaForCausalLM": ("JambaConfig", {**TEXT, **TOKENS, **HYBRID}, {"dt_proj"}),
    "BloomForCausalLM": ("BloomConfig", BLOOM, set()),
    "BloomModel": ("BloomConfig", {**BLOOM, **SLOW}, {"self_attention.dense", "dense_4h_to_h"}),
    "MobileBertForMaskedLM": ("MobileBertConfig", MOBILE, {"decoder", "predictions.dense"}),
    "WavLMModel": ("WavLMConfig", SPEECH, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "SiglipVisionModel": ("SiglipVisionConfig", IMAGE, {"head.attention.out_proj"}),
}


def made(model: str, config: str, settings: dict) -> nn.Module:
    import transformers

    return build(getattr(transformers, model), getattr(transformers, config)(**settings))


@pytest.fixture(scope="module")
def mamba() -> nn.Module:
    return made("MambaForCausalLM", "MambaConfig", {**STATE, "initializer_range": 0.25})


def zeroed(folder):
    """An adapter's folder, whose updates of ``dt_proj`` are as PEFT's training leaves them."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({k: v.zero_() if "dt_proj.lora_B" in k else v for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize("name", FOUND)
def test_what_a_model_uses_without_calling_it_is_found(name):
    config, settings, ends = FOUND[name]
    model = made(name, config, settings).train()
    state = torch.get_rng_state()
    reads = find_weight_reads(model)
    assert {end for found in reads.outside for end in ends if found.endswith(end)} == ends
    linear = {found for found in reads.outside if not isinstance(model.get_submodule(found), nn.Embedding)}
    assert all(found.endswith(tuple(ends)) for found in linear)
    assert not reads.unknown(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_updates_of_zero_are_left_out_with_a_remark(mamba, tmp_path, caplog):
    zeroed(peft_adapter(mamba, tmp_path / "ants", seed=1, targets=TARGETS))
    theirs = peft_model(mamba, tmp_path / "ants")(ids).logits
    model = made("MambaForCausalLM", "MambaConfig", {**STATE, "initializer_range": 0.25})
    with caplog.at_level(logging.WARNING):
        routed = compose(model, ExpertLibrary.open(tmp_path), Oracle(expert="ants"))
    assert "'ants' has updates of zero at 2 layers" in caplog.text
    assert "dt_proj" not in " ".join(routed.layers)
    close(model(ids).logits, theirs)
    routed.allow(["ants"])
    close(model(ids).logits, theirs)


@pytest.mark.parametrize("targets", [TARGETS, ["dt_proj"]], ids=["with others", "alone"])
@torch.no_grad()
def test_other_updates_are_applied_where_a_prompt_has_one_expert(targets, mamba, tmp_path):
    theirs = []
    for number, name in enumerate(("ants", "bees")):
        peft_adapter(mamba, tmp_path / name, seed=number, targets=targets)
        theirs.append(peft_model(mamba, tmp_path / name).merge_and_unload()(ids).logits)
    model = made("MambaForCausalLM", "MambaConfig", {**STATE, "initializer_range": 0.25})
    plain, library = model(ids).logits, ExpertLibrary.open(tmp_path)
    assert all((each - plain).abs().max() > 1e-3 for each in theirs)
    for number, name in enumerate(library.names):
        routed = compose(model, library, Oracle(expert=name))
        close(model(ids).logits, theirs[number])
        close(copy.deepcopy(model)(ids).logits, theirs[number])
        routed.remove()
        assert torch.equal(model(ids).logits, plain)
    if targets == ["dt_proj"]:
        assert "bees have no LoRA factors" in str(refused(mamba, tmp_path, Calibrated(abstain=None)).given)
        return
    routed = compose(model, library, ROWS)
    for first, number in ((4, 0), (5, 1)):
        row = ids[:1].clone()
        row[0, 0] = first
        peft = peft_model(mamba, tmp_path / library.names[number]).merge_and_unload()
        close(model(row).logits, peft(row).logits)
        assert torch.equal(greedy(model, row), greedy(peft, row))
    with pytest.raises(CompositionError, match=r"without calling it(.|\n)*one at a time"):
        model(torch.tensor([[4, 5], [5, 4]]))
    routed.allow(["bees"])
    close(model(ids).logits, theirs[1])
    with trace(model) as record:
        model(ids)
    assert not any("dt_proj" in name for name in record)


def test_other_updates_are_refused_by_name_where_tokens_choose(mamba, tmp_path):
    for number, name in enumerate(("ants", "bees")):
        peft_adapter(mamba, tmp_path / name, seed=number, targets=TARGETS)
    error = refused(mamba, tmp_path, Spectr(top_k=1))
    assert "ants, bees: each changes backbone.layers.0.mixer.dt_proj, backbone.layers.1.mixer.dt_proj" in error.given
    assert "--method average --into-base" in str(error.do)


def refused(model, folder, router):
    before = model(ids).logits
    with types_unchecked(), pytest.raises(CompositionError) as caught:
        compose(model, ExpertLibrary.open(folder), router)
    assert torch.equal(model(ids).logits, before)
    return caught.value


class Odd(nn.Module):
    """A model that cannot be tried: it wants something else than tokens, and uses one layer's weight by itself."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, points, *, twice=None):
        out = self.called(points.to(self.read.weight))
        return out if twice is None else out @ self.read.weight.T.contiguous()


def test_what_cannot_be_tried_is_followed_in_its_first_calls(tmp_path):
    module_adapter(tmp_path / "ants", {"called": (8, 8), "read": (8, 8)})
    module_adapter(tmp_path / "bees", {"called": (8, 8)})
    model, points = build(lambda _: Odd(), None), torch.randn(2, 3, 8)
    routed = compose(model, ExpertLibrary.open(tmp_path), Oracle(expert="ants"))
    model(points)
    for _ in range(2):
        with pytest.raises(CompositionError, match=re.escape("'ants' changes read, whose weights")):
            model(points, twice=True)
    routed.remove()
    compose(model, ExpertLibrary.open(tmp_path), Oracle(expert="bees"))
    model(points, twice=True)


@torch.no_grad()
def test_weights_are_followed_through_what_is_made_of_them():
    one, two, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(2, 8)
    both = nn.ModuleDict({"one": one, "two": two})
    with WeightReads(both) as reads:
        joined = torch.cat([one.weight.T, two.weight.data.to(torch.float64)])
        torch.zeros_like(one.weight) @ x.T
        x.to(two.weight)
        one.forward(x) + one.bias
    assert not reads.outside
    assert reads.called == {"one"}
    with reads:
        joined[:8] @ x.T.double()
    assert reads.outside == {"one", "two"}
