"""Weights that quantisers keep in tensors of their own: adapters compute as on the dequantised base, or are refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from adapters_on_disk import save_with_peft
from models import close, identities, logits, peft_adapter, peft_model, tiny_llama, tokens
from quantised import quantised
from spectr import ExpertLibrary, Oracle, Spectr, compose
from spectr.errors import AdapterError, CompositionError, MergeError
from spectr.merging import make_recipe, merge_into

ids = tokens()
LAYERS = [f"model.layers.{n}.{name}" for n in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
TARGETS = ["q_proj", "down_proj", "v_proj"]


def library_of(folder, **config):
    peft_adapter(tiny_llama(), folder / "ants", 1, targets=TARGETS, **config)
    return ExpertLibrary.open(folder)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("router", [Oracle(expert="ants"), Spectr(top_k=1)], ids=["held", "token"])
def test_an_adapter_computes_as_on_the_dequantised_base(tmp_path, config, router):
    model, dense = quantised(tiny_llama(), LAYERS)
    before = logits(model, ids)
    library = library_of(tmp_path, **config)
    want = logits(peft_model(dense, tmp_path / "ants"), ids)
    routed = compose(model, library, router)
    close(logits(model, ids), want)
    assert (want - before).norm() > 0.01 * before.norm()
    assert torch.equal(logits(routed.remove(), ids), before)


def test_initial_factors_of_a_quantised_weight_are_refused(tmp_path):
    library = library_of(tmp_path, init_lora_weights="olora")
    model, _ = quantised(tiny_llama(), LAYERS)
    before = identities(model)
    with pytest.raises(AdapterError, match="_proj is quantised"):
        compose(model, library, Oracle(expert="ants"))
    assert identities(model) == before


class Later(torch.nn.Linear):
    """As quanto's layers before they are frozen: the weight is rounded in each call."""

    def forward(self, input):
        return torch.nn.functional.linear(input, self.weight.round(decimals=1), self.bias)


def test_initial_factors_of_a_layer_that_computes_in_its_own_way_are_refused(tmp_path):
    library = library_of(tmp_path, init_lora_weights="olora")
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.__class__ = Later
    with pytest.raises(AdapterError, match="q_proj is quantised"):
        compose(model, library, Oracle(expert="ants"))


def test_a_quantised_weight_takes_no_sum(tmp_path):
    library = library_of(tmp_path)
    model, _ = quantised(tiny_llama(), LAYERS)
    with pytest.raises(MergeError, match="cannot be changed: they are quantised"):
        merge_into(model, library, make_recipe(library, ["ants"], "average"))


SAVED = {
    "head": (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "lm_head"),
    "rows": (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5]), "model.embed_tokens"),
    "factors": (LoraConfig(target_modules=["q_proj", "embed_tokens"]), "model.embed_tokens"),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_trained_module_that_is_quantised_here_is_refused(tmp_path, kind):
    config, module = SAVED[kind]
    save_with_peft(tmp_path / "ants", tiny_llama(), config, save_embedding_layers=False)
    model, _ = quantised(tiny_llama(), [module])
    with pytest.raises(CompositionError, match=rf"{module} \(.*quantised here"):
        compose(model, ExpertLibrary.open(tmp_path), Oracle(expert="ants"))
