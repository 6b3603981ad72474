"""Modules that a configuration targets are those that PEFT adapts, whatever else the file holds."""

import json

import pytest
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from adapters_on_disk import (
    assert_says,
    factors,
    load_with_peft,
    peft_layers,
    save_with_peft,
    tiny_llama,
    write_adapter,
)
from spectr.adapters import read_adapter
from spectr.adapters.targets import Targets, target_faults
from spectr.errors import AdapterError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
PARTS = ["model", "layers", "h", "0", "1", "experts", "3", "q_proj", "xq_proj", "v_proj", "lm_head"]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join)
SOME = st.lists(st.sampled_from(["q_proj", "v_proj", "0.q_proj", "layers.1.q_proj", "lm_head", "q"]), min_size=1)
LISTED = st.fixed_dictionaries(
    {"target_modules": SOME},
    optional={
        "exclude_modules": st.one_of(SOME, st.sampled_from([r".*\.1\..*", "q_proj"])),
        "layers_to_transform": st.one_of(st.integers(0, 3), st.lists(st.integers(0, 3))),
        "layers_pattern": st.sampled_from(["layers", "h", ["h", "layers"], "", []]),
        "modules_to_save": st.just(["lm_head"]),
    },
)
REGEX = st.fixed_dictionaries(
    {"target_modules": st.sampled_from([r".*\.(q|v)_proj", r"q_proj", r"model\.layers\.[01]\..*proj", ".*"])},
    optional={"exclude_modules": st.one_of(SOME, st.just(r"model\.layers\.0.*"))},
)


@given(module=NAMES, settings=st.one_of(LISTED, REGEX))
def test_targets_are_pefts(module, settings):
    config = LoraConfig()
    for key, value in settings.items():
        setattr(config, key, value)
    assert Targets.of(settings).has(module) == bool(check_target_module_exists(config, module))


def test_parameters_alone_target_no_modules():
    assert not check_target_module_exists(LoraConfig(target_parameters=["experts.w"]), "q_proj")
    assert not Targets.of({"target_modules": None, "target_parameters": ["experts.w"]}).has("q_proj")


@pytest.mark.parametrize("more", [{"use_dora": True}, {"init_lora_weights": "olora"}])
def test_a_bias_of_b_is_for_plain_lora(tmp_path, more):
    with pytest.raises(ValueError, match="lora_bias"):
        LoraConfig(lora_bias=True, **more)
    with pytest.raises(AdapterError, match="lora_bias is set with use_dora or with other initial factors"):
        read_adapter(write_adapter(tmp_path / "a", lora_bias=True, **more), "a")


NARROWER = {
    "fewer ends of names": {"target_modules": ["v_proj"]},
    "a regular expression": {"target_modules": r".*\.layers\.1\..*_proj"},
    "one layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "what is left after exclusion": {"target_modules": "all-linear", "exclude_modules": ["up_proj", "q_proj"]},
    "a whole name": {"target_modules": [Q]},
}


@pytest.mark.parametrize("settings", NARROWER.values(), ids=NARROWER.keys())
def test_modules_that_are_not_targeted_are_left_out_as_peft_does(tmp_path, settings):
    folder = save_with_peft(tmp_path, tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    change(folder, **settings)
    expert = read_adapter(folder, "a")
    layers = peft_layers(load_with_peft(folder, tiny_llama()))
    assert set(expert.shapes) == set(layers) & {*expert.shapes, *expert.left_out}
    assert len(expert.shapes) + len(expert.left_out) == 6
    assert f"does not target {len(expert.left_out)} modules" in expert.remark_left_out


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_what_is_left_out_may_be_anything(tmp_path):
    tensors = {**factors(), "conv.lora_A.weight": torch.ones(2, 3, 3, 3), "conv.lora_B.weight": torch.ones(8, 2, 1, 1)}
    folder = write_adapter(tmp_path, tensors=tensors, target_modules=["q_proj"])
    assert list(read_adapter(folder, "a").shapes) == [Q]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "("},
        {"target_modules": [3]},
        {"target_modules": {"q_proj": 1}},
        {"exclude_modules": "["},
        {"layers_to_transform": "all", "target_modules": ["q_proj"]},
        {"layers_to_transform": [1.5], "target_modules": ["q_proj"]},
        {"layers_to_transform": [1], "target_modules": "all-linear"},
        {"layers_pattern": "(", "layers_to_transform": [1], "target_modules": ["q_proj"]},
    ],
)
def test_settings_that_are_wrong_are_named(tmp_path, settings):
    assert list(target_faults(settings))
    with pytest.raises(AdapterError, match=next(iter(settings))):
        read_adapter(write_adapter(tmp_path, **settings), "sql")


WRAPPED = {
    "torch.compile": ("base_model.model.", "base_model.model._orig_mod."),
    "torch.compile around PEFT": ("base_model.model.", "_orig_mod.base_model.model."),
    "torch.compile of each layer": (".self_attn.", "._orig_mod.self_attn."),
    "FSDP": (".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "PEFT around PEFT": ("base_model.model.", "base_model.model.base_model.model."),
    "DistributedDataParallel": ("base_model.model.", "module.base_model.model."),
    "activation checkpointing": (".self_attn.", "._checkpoint_wrapped_module.self_attn."),
}


@pytest.mark.parametrize(("old", "new"), WRAPPED.values(), ids=WRAPPED.keys())
def test_names_that_wrappers_leave_are_read(tmp_path, old, new):
    tensors = {key.replace(old, new): tensor for key, tensor in factors().items()}
    expert = read_adapter(write_adapter(tmp_path, tensors=tensors, target_modules=["q_proj", "v_proj"]), "a")
    assert list(expert.shapes) == [Q, V]
    with expert.open() as read:
        assert read(Q).A.equal(factors()[f"base_model.model.{Q}.lora_A.weight"])


def test_tensors_that_deepspeed_left_empty(tmp_path):
    folder = write_adapter(tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: tensor[:0] for key, tensor in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, "sql")
    given = ("expert 'sql'", "4 of 4 tensors", "are empty", "DeepSpeed ZeRO-3")
    assert_says(caught.value, given=given, expected="complete factors", do="zero_to_fp32.py")
