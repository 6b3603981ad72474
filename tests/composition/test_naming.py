"""Adapters under module names of older versions of transformers are those that PEFT loads."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from adapters_on_disk import save_with_peft
from models import (
    TEXT,
    TOKENS,
    build,
    close,
    logits,
    peft_adapter,
    peft_model,
    random_factors,
    tiny_llama,
    tokens,
    write_adapter,
)
from spectr import ExpertLibrary, Oracle, compose
from spectr.adapters import named_for, read_adapter
from spectr.adapters.naming import Naming
from spectr.composition.model_naming import naming_of
from spectr.errors import AdapterError, CompositionError
from spectr.ops.dispatch import report_once

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
LANGUAGE = r".*language_model.*(q_proj|v_proj|up_proj)"
OLD = ("model.language_model.", "language_model.model.")


def llava():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={**TEXT, **TOKENS, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
        image_token_index=55,
        vision_feature_layer=-1,
    )
    return build(LlavaForConditionalGeneration, config)


def renamed(folder, old, new, **settings):
    weights = {key.replace(old, new): tensor for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


def composed(model, folder):
    return compose(model, ExpertLibrary.from_adapters({"a": folder}), Oracle(expert="a"))


@pytest.mark.parametrize("settings", [{}, {"alpha_pattern": {r".*language_model\.layers\.1.*": 3}}], ids=["", "alpha"])
def test_old_names_are_read_as_peft_reads_them(tmp_path, settings):
    folder = renamed(peft_adapter(llava(), tmp_path / "a", 1, targets=LANGUAGE), *OLD, **settings)
    assert all(name.startswith("language_model.model.") for name in read_adapter(folder, "a").shapes)
    model, ids = llava(), tokens() % 50
    want = logits(peft_model(llava(), folder), ids)
    handle = composed(model, folder)
    assert all(name.startswith("model.language_model.") for name in handle.layers)
    close(logits(model, ids), want)
    handle.add("b", folder)  # under the same names


def test_targets_count_by_the_names_of_the_model(tmp_path):
    folder = renamed(peft_adapter(llava(), tmp_path / "a", 1, targets=LANGUAGE), *OLD)
    renamed(folder, "none", "none", target_modules=r".*language_model\.layers\.1\..*(q_proj|v_proj|up_proj)")
    ids, model = tokens() % 50, llava()
    want = logits(peft_model(llava(), folder), ids)
    expert = composed(model, folder).library["a"]
    assert len(expert.shapes) == len(expert.left_out) == 3
    close(logits(model, ids), want)


def test_a_configuration_that_targets_nothing_of_this_model(tmp_path):
    folder = renamed(peft_adapter(llava(), tmp_path / "a", 1, targets=LANGUAGE), *OLD)
    renamed(folder, "none", "none", target_modules=r"language_model\.model\..*")
    with pytest.raises(CompositionError, match=r"'a' adapts nothing in this model(.|\n)*correct target_modules"):
        composed(llava(), folder)


def test_a_configuration_that_targets_nothing_of_the_file(tmp_path):
    factors = {"model.layers.0.self_attn.q_proj": random_factors(2, 32, 32, 1)}
    with pytest.raises(CompositionError, match=r"targets none of the modules in its file \(model\.layers"):
        composed(tiny_llama(), write_adapter(tmp_path / "a", factors, target_modules=["o_proj"]))


def test_names_that_the_configuration_lists_in_full_are_renamed_with_the_file(tmp_path):
    old = "language_model.model.layers.0.self_attn.q_proj"
    factors = {old: random_factors(3, 32, 32, 1)}
    folder = write_adapter(tmp_path / "a", factors, rank_pattern={f"^{old}": 3}, r=2)
    [module] = composed(llava(), folder).layers
    assert module == "model.language_model.layers.0.self_attn.q_proj"


def test_all_linear_layers_are_all_but_the_head(tmp_path):
    factors = {"lm_head": random_factors(2, 32, 61, 1), "model.layers.0.mlp.up_proj": random_factors(2, 32, 48, 2)}
    handle = composed(tiny_llama(), write_adapter(tmp_path / "a", factors, target_modules="all-linear"))
    assert list(handle.layers) == ["model.layers.0.mlp.up_proj"]


def test_what_is_left_out_is_named_once(tmp_path, caplog):
    factors = {f"model.layers.0.self_attn.{p}_proj": random_factors(2, 32, 32, 1) for p in "qo"}
    folder = write_adapter(tmp_path / "a", factors, target_modules=["q_proj"])
    report_once.cache_clear()
    composed(tiny_llama(), folder)
    composed(tiny_llama(), folder)
    assert caplog.text.count("does not target 1 modules in its file") == 1
    assert "model.layers.0.self_attn.o_proj" in caplog.text


def test_two_names_of_one_module_are_refused(tmp_path):
    factors = {name: random_factors(2, 4, 4, 1) for name in ("old.q", "new.q")}
    expert = read_adapter(write_adapter(tmp_path / "a", factors), "a")
    naming = Naming(modules={"new.q"}, renamed=lambda name: name.replace("old", "new"))
    with pytest.raises(AdapterError, match=r"tensors of new\.q twice"):
        named_for(expert, naming)


EMBEDDED = {"alpha": {r".*language_model\.embed_tokens": 3}, "rslora": {}}


@pytest.mark.parametrize("kind", EMBEDDED)
def test_a_renamed_embedding_has_the_scale_of_its_new_name(tmp_path, kind):
    config = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|embed_tokens)")
    folder = save_with_peft(tmp_path / "a", llava(), config, save_embedding_layers=False)
    renamed(folder, *OLD, alpha_pattern=EMBEDDED[kind], use_rslora=kind == "rslora")
    model, ids = llava(), tokens() % 50
    plain = logits(model, ids)
    want = logits(peft_model(llava(), folder), ids)
    composed(model, folder)
    assert (want - plain).norm() > 0.01 * plain.norm()
    close(logits(model, ids), want)


@pytest.mark.parametrize("embedding", [False, True])
def test_a_rank_that_neither_name_has_is_refused(tmp_path, embedding):
    A, B = random_factors(3, 4, 4, 1)
    end = "lora_embedding_{}" if embedding else "lora_{}.weight"
    tensors = {f"base_model.model.old.q.{end.format(side)}": factor for side, factor in (("A", A), ("B", B))}
    folder = write_adapter(tmp_path / "a", {"old.v": random_factors(2, 4, 4, 1)}, target_modules=["old.v", "new.q"])
    save_file({**load_file(folder / "adapter_model.safetensors"), **tensors}, folder / "adapter_model.safetensors")
    naming = Naming(modules={"new.q", "old.v"}, renamed=lambda name: name.replace("old", "new"))
    with pytest.raises(AdapterError, match=r"old\.q has factors of rank 3 but the configuration says rank 2 for new"):
        named_for(read_adapter(folder, "a"), naming)


def test_a_plain_module_has_no_older_names():
    naming = naming_of(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert [naming.of(name) for name in ("0", "old.0")] == ["0", "old.0"]


def test_renaming_patterns_of_version_4_of_transformers():
    model = torch.nn.Module()
    model.model = torch.nn.ModuleDict({"language_model": torch.nn.Linear(2, 2)})
    model.config = type("Config", (), {"model_type": "x"})()
    model._checkpoint_conversion_mapping = {"^language_model.model": "model.language_model", "^visual": "model.visual"}
    assert naming_of(model).of("language_model.model") == "model.language_model"
