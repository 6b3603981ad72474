"""``spectr library check``: what an adapter is and what of it would be routed, by exit codes and as JSON."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from beyond_lora import KINDS, moved_adapter
from families import FAMILIES
from models import TEXT, TOKENS, peft_adapter, random_factors, tiny_llama, write_adapter
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


@pytest.mark.parametrize("config", [None, "{", "[1]", '{"model_type": "llama", "hidden_size": "x"}'])
def test_a_base_model_that_was_given_and_cannot_be_read_is_refused(spectr, tmp_path, config):
    if config is not None:
        (tmp_path / "base").mkdir()
        (tmp_path / "base/config.json").write_text(config)
    adapter = write_adapter(tmp_path / "a", FACTORS, base_model_name_or_path=str(tmp_path / "base"))
    code, found, _ = checked(spectr, adapter, "-m", tmp_path / "base")
    assert code == 2
    assert "base is not on this machine, or its configuration cannot be read" in found["refused"]
    assert checked(spectr, adapter)[0] == 3


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


LACKING = {  # what the configuration names, a part of the names of tensors that the file lacks, and what is missing
    "a head": ({"modules_to_save": ["lm_head"]}, "lm_head", ["lm_head"]),
    "tokens": ({"trainable_token_indices": [3, 5]}, "token_adapter", ["model.embed_tokens"]),
    "an embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed", ["model.embed_tokens"]),
    "a layer": ({}, "layers.1.self_attn.v", ["model.layers.1.self_attn.v_proj"]),
}


@pytest.mark.parametrize("kind", LACKING)
def test_what_the_configuration_names_and_the_file_lacks(spectr, tmp_path, base, kind):
    settings, lacking, missing = LACKING[kind]
    folder = moved_adapter(tiny_llama(), tmp_path / "a", 1, **settings)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if lacking not in k}, folder / "adapter_model.safetensors")
    code, found, _ = checked(spectr, folder, "-m", base)
    assert (code, found["missing"]) == (1, missing)


def test_parameters_that_the_file_lacks(spectr, tmp_path):
    model = FAMILIES["mixtral"].build()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "base")
    both = {"targets": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    folder = peft_adapter(model, tmp_path / "a", 1, **both)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "experts" not in k}, folder / "adapter_model.safetensors")
    code, found, _ = checked(spectr, folder, "-m", tmp_path / "base")
    names = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("down_proj", "gate_up_proj")]
    assert (code, found["missing"]) == (1, names)


def test_an_embeddings_update_of_zero_and_values_that_are_not_finite(spectr, tmp_path, base):
    folder = moved_adapter(tiny_llama(), tmp_path / "a", 1, target_modules=["q_proj", "embed_tokens"])
    weights, file = load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors"
    save_file({k: v * (0 if "embedding_B" in k else 1) for k, v in weights.items()}, file)
    code, found, _ = checked(spectr, folder, "-m", base)
    assert (code, found["idle"]) == (1, {"model.embed_tokens": "its update is zero"})
    save_file({k: v * (float("nan") if "embedding_B" in k else 1) for k, v in weights.items()}, file)
    code, found, _ = checked(spectr, folder, "-m", base)
    assert code == 2
    assert "holds NaN or infinite values" in found["refused"]


@pytest.mark.parametrize("task", [("SEQ_CLS", "SequenceClassification"), ("TOKEN_CLS", "TokenClassification")])
def test_heads_of_tasks_are_checked_in_the_class_of_the_task(spectr, tmp_path, base, task):
    import transformers

    causal = tiny_llama()
    causal.config.num_labels = 3
    model = getattr(transformers, f"LlamaFor{task[1]}")(causal.config)
    code, found, _ = checked(spectr, moved_adapter(model, tmp_path / "a", 1, task_type=task[0]), "-m", base)
    assert (code, "score" in found["routed"]) == (0, True)
    assert f"needs its base model as LlamaFor{task[1]} with num_labels=3" in found["remarks"]


def test_an_adapter_of_the_language_model_in_a_configuration_of_several(spectr, tmp_path):
    from transformers import Llama4Config, Llama4ForCausalLM

    sizes = {**TEXT, **TOKENS, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    config = Llama4Config(text_config=sizes, architectures=["Llama4ForConditionalGeneration"])
    config.save_pretrained(tmp_path / "base")
    folder = moved_adapter(Llama4ForCausalLM(config.text_config), tmp_path / "a", 1)
    code, found, _ = checked(spectr, folder, "-m", tmp_path / "base")
    assert (code, len(found["routed"])) == (0, 4)
    assert found["remarks"] == ["needs its base model as Llama4ForCausalLM"]


def test_more_than_plain_lora_where_a_weight_is_read_without_a_call(spectr, tmp_path):
    model = FAMILIES["mamba"].build()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["in_proj", "dt_proj"], "use_dora": True}
    folder = moved_adapter(model, tmp_path / "a", 1, **settings)
    code, found, _ = checked(spectr, folder, "-m", tmp_path / "base")
    assert code == 2
    assert "whose weights this model uses without calling the layer" in found["refused"]
    weights = load_file(folder / "adapter_model.safetensors")
    zero = {k: v * (0 if "dt_proj.lora_B" in k else 1) for k, v in weights.items()}
    save_file(zero, folder / "adapter_model.safetensors")
    code, found, _ = checked(spectr, folder, "-m", tmp_path / "base")
    assert code == 1
    assert list(found["idle"]) == [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]


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
