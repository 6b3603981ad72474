"""``spectr library check``: what an adapter is and what of it would be routed, by exit codes and as JSON."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from beyond_lora import KINDS, moved_adapter
from families import FAMILIES
from models import peft_adapter, random_factors, tiny_llama, write_adapter
from spectr import ExpertLibrary, Oracle, compose
from spectr.ops.dispatch import report_once

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
FACTORS = {Q: random_factors(2, 32, 32, 1), V: random_factors(2, 32, 16, 2)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model = tiny_llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)  # no weights: they are not read
    return folder


def checked(spectr, folder, *options):
    code, text, _ = spectr("library", "check", folder, *options, "--json")
    found = json.loads(text)
    assert found["exit_code"] == code
    shown = spectr("library", "check", folder, *options)
    assert shown[0] == code
    return code, found, shown[1]


def test_an_adapter_that_routes_in_full(spectr, tmp_path, base):
    code, found, shown = checked(spectr, write_adapter(tmp_path / "a", FACTORS, base_model_name_or_path=str(base)))
    assert (code, found["routed"], found["idle"], found["missing"]) == (0, [Q, V], {}, [])
    assert found["kind"].startswith("LoRA of rank 2 in 2 modules")
    for part in ("all of it is routed", str(base), "LoRA of rank 2"):
        assert part in shown


def test_parts_that_do_nothing_and_why(spectr, tmp_path, base):
    folder = write_adapter(tmp_path / "a", FACTORS, target_modules=["v_proj", "o_proj"], r=2)
    weights = load_file(folder / "adapter_model.safetensors")
    extra = "base_model.model.model.layers.0.self_attn.o_proj"
    weights |= {f"{extra}.lora_A.weight": torch.ones(2, 32), f"{extra}.lora_B.weight": torch.zeros(32, 2)}
    save_file(weights, folder / "adapter_model.safetensors")
    code, found, shown = checked(spectr, folder, "-m", base)
    assert (code, found["routed"]) == (1, [V])
    o = "model.layers.0.self_attn.o_proj"
    assert found["idle"][o] == "its update is zero"
    assert "does not target" in found["idle"][Q]
    assert found["missing"] == ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.o_proj"]
    assert f"its update is zero: {o}" in shown


def test_an_adapter_that_is_refused(spectr, tmp_path, base):
    other = {Q: random_factors(2, 16, 16, 1)}
    code, found, shown = checked(spectr, write_adapter(tmp_path / "a", other), "-m", base)
    assert code == 2
    assert "does not fit the sizes of" in found["refused"]
    assert "does not fit the sizes of" in shown
    code, found, _ = checked(spectr, tmp_path)
    assert code == 2
    assert "adapters in subfolders: a" in found["refused"]


def test_a_base_model_that_is_not_here(spectr, tmp_path):
    folder = write_adapter(tmp_path / "a", FACTORS, base_model_name_or_path="unsloth/Qwen3-8B-bnb-4bit")
    code, found, shown = checked(spectr, folder)
    assert (code, found["base"], found["likely"]) == (3, None, "Qwen/Qwen3-8B")
    assert "most likely Qwen/Qwen3-8B" in shown


def test_a_base_model_that_was_given_and_is_not_here_is_an_error(spectr, tmp_path):
    code, _, notes = spectr("library", "check", write_adapter(tmp_path / "a", FACTORS), "-m", "./nowhere")
    assert code == 2
    assert "./nowhere is not on this machine" in notes


def test_names_that_differ_although_the_sizes_fit_are_reported(spectr, tmp_path, base, caplog):
    folder = write_adapter(tmp_path / "a", FACTORS, base_model_name_or_path="org/other")
    code, found, _ = checked(spectr, folder, "-m", base)
    assert code == 0
    assert "but the adapter names org/other as its base" in found["remarks"][0]
    model = tiny_llama()
    model.config._name_or_path = str(base)
    report_once.cache_clear()
    compose(model, ExpertLibrary.from_adapters({"a": folder}), Oracle(expert="a"))
    assert "the sizes of expert 'a' fit this model" in caplog.text


def test_a_base_model_that_cannot_be_made_is_no_traceback(spectr, tmp_path, base, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.__init__", lambda *_: 1 / 0)
    code, found, _ = checked(spectr, write_adapter(tmp_path / "a", FACTORS), "-m", base)
    assert code == 2
    assert "cannot be built from its configuration: ZeroDivisionError" in found["refused"]


MORE = {  # by kind of adapter: settings of PEFT, and what is said of it
    **{kind: (settings, "") for kind, settings in KINDS.items()},
    "PiSSA": ({"init_lora_weights": "pissa"}, "PiSSA"),
    "a head": ({"modules_to_save": ["lm_head"]}, "changes lm_head as a whole"),
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "changes model.embed_tokens as a whole"),
    "tokens": ({"trainable_token_indices": [3, 5]}, "changes model.embed_tokens as a whole"),
}


@pytest.mark.parametrize("kind", MORE)
def test_adapters_that_are_more_than_two_factors(spectr, tmp_path, base, kind):
    settings, said = MORE[kind]
    model = tiny_llama(attention_bias=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path / "base")
    code, found, _ = checked(spectr, moved_adapter(model, tmp_path / "a", 1, **settings), "-m", tmp_path / "base")
    assert (code, found["idle"], found["missing"]) == (0, {}, [])
    assert said in " ".join([found["kind"], *found["remarks"]])
    assert ("one expert a prompt" in " ".join(found["remarks"])) == said.startswith("changes")


def test_parameters_of_mixtures_and_weights_that_are_read(spectr, tmp_path):
    for name, targets, code in (
        ("mixtral", {"targets": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}, 0),
        ("mamba", {"targets": ["in_proj", "dt_proj"]}, 0),
        ("t5", {"targets": ["q", "v"]}, 0),
        ("vit", {"targets": r".*(query|value|q_proj|v_proj)"}, 0),
    ):
        model = FAMILIES[name].build()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path / f"{name} base")
        found = checked(spectr, peft_adapter(model, tmp_path / name, 1, **targets), "-m", tmp_path / f"{name} base")
        assert found[0] == code
        assert found[1]["routed"]
        assert ("dt_proj" in " ".join(found[1]["remarks"])) == (name == "mamba")


def test_other_methods_are_refused_with_the_cure(spectr, tmp_path):
    folder = write_adapter(tmp_path / "a", FACTORS, peft_type="LOHA")
    code, found, _ = checked(spectr, folder)
    assert code == 2
    assert "save_as_lora" in found["refused"]
