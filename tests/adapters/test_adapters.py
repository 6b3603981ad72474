"""Adapters that PEFT wrote are read as PEFT reads them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig, load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from adapters_on_disk import (
    MODULES,
    factors,
    key_A,
    key_B,
    load_with_peft,
    peft_layers,
    save_with_peft,
    tiny_gpt2,
    tiny_llama,
    write_adapter,
)
from spectr.adapters import Expert, locate_adapter, read_adapter
from spectr.adapters.adapter_config import AdapterConfig
from spectr.library import ExpertLibrary, LibraryStore

QV = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
LLAMA = {
    "alpha over r": QV,
    "rsLoRA": {**QV, "use_rslora": True},
    "rank_pattern": {**QV, "rank_pattern": {"q_proj": 3}},
    "alpha_pattern": {**QV, "alpha_pattern": {"v_proj": 5}},
    "both patterns, rsLoRA": {**QV, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    "regular expressions": {
        **QV,
        "rank_pattern": {r"layers\.1\..*": 3, r"self_attn\.[qk]_proj": 1},
        "alpha_pattern": {r".*\.0\..*\.v_proj": 7, r"layers.[01].self_attn.q_proj": 9},
    },
    "whole names": {
        **QV,
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 3, "model.layers.1.self_attn.v_proj": 1},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 16},
    },
    "a pattern that only looks alike": {**QV, "rank_pattern": {"proj": 3, "0.self_attn": 2}, "alpha_pattern": {"q": 9}},
    "the first of two matching patterns": {**QV, "rank_pattern": {"q_proj": 3, "self_attn.q_proj": 1}},
    "rank above the module's size": {**QV, "r": 32},
    "one layer": {**QV, "layers_to_transform": [1], "layers_pattern": "layers"},
    "all linear layers": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "targets by regular expression": {"r": 2, "lora_alpha": 3, "target_modules": r".*\.mlp\.(up|down)_proj"},
    "excluded modules": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "other initialisation": {**QV, "init_lora_weights": "gaussian", "lora_dropout": 0.25},
}
GPT2 = {
    "one transposed layer": {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn"]},
    "all, rsLoRA": {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_proj", "c_fc"], "use_rslora": True},
}


def deltas_of(expert: Expert) -> dict[str, torch.Tensor]:
    with expert.open() as read:
        return {module: scale * B @ A for module in expert.shapes for A, B, scale in [read(module)]}


def peft_deltas(wrapped, *, transposed: bool = False) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        weights = {name: layer.get_delta_weight("default") for name, layer in peft_layers(wrapped).items()}
    return {name: weight.T if transposed else weight for name, weight in weights.items()}


def assert_same_deltas(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == sorted(expected)
    for module, delta in expected.items():
        assert delta.any(), "the oracle is zero, and would agree with anything"
        torch.testing.assert_close(found[module], delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", LLAMA.values(), ids=LLAMA.keys())
def test_update_of_every_module_is_pefts(tmp_path, settings):
    folder = save_with_peft(tmp_path / "a", tiny_llama(), LoraConfig(**settings))
    reloaded = load_with_peft(folder, tiny_llama())
    assert_same_deltas(deltas_of(read_adapter(folder, "a")), peft_deltas(reloaded))


@pytest.mark.parametrize("settings", GPT2.values(), ids=GPT2.keys())
def test_update_of_a_transposed_layer_is_the_transpose_of_pefts(tmp_path, settings):
    folder = save_with_peft(tmp_path / "a", tiny_gpt2(), LoraConfig(**settings, fan_in_fan_out=True))
    reloaded = load_with_peft(folder, tiny_gpt2())
    assert_same_deltas(deltas_of(read_adapter(folder, "a")), peft_deltas(reloaded, transposed=True))


def test_output_head_can_be_adapted_where_peft_did_not_save_it_whole(tmp_path):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head"])
    folder = save_with_peft(tmp_path / "a", tiny_llama(), config, save_embedding_layers=False)
    assert_same_deltas(deltas_of(read_adapter(folder, "a")), peft_deltas(load_with_peft(folder, tiny_llama())))


def test_modules_are_those_of_the_bare_model(tmp_path):
    folder = save_with_peft(tmp_path / "a", tiny_llama(), LoraConfig(**QV))
    modules = dict(tiny_llama().named_modules())
    for name, shape in read_adapter(folder, "a").shapes.items():
        assert (shape.inputs, shape.outputs) == (modules[name].in_features, modules[name].out_features)


def test_facts_are_those_of_the_tensors(tmp_path):
    model = tiny_llama()
    model.name_or_path = "org/base"
    folder = save_with_peft(tmp_path / "a", model, LoraConfig(**{**QV, "rank_pattern": {"q_proj": 3}}))
    layers = peft_layers(load_with_peft(folder, tiny_llama())).values()
    numbers = sum(side["default"].weight.numel() for layer in layers for side in (layer.lora_A, layer.lora_B))
    expert = read_adapter(folder, "sql")
    assert (expert.name, expert.base_model, expert.origin) == ("sql", "org/base", str(folder))
    assert expert.weights == folder / "adapter_model.safetensors"
    assert (expert.ranks, expert.parameters) == ((3, 4), numbers)


NAMES = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "attn", "q_proj", "v_proj", "a+b"]), min_size=1, max_size=5
)
PATTERNS = st.sampled_from(
    [r"q_proj", r"attn.q_proj", r"layers\.0\..*", r".*_proj", r"model.layers.1.attn.v_proj", "0", "a+b"]
)


@given(
    module=NAMES.map(".".join),
    ranks=st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4),
    alphas=st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4),
    rslora=st.booleans(),
)
def test_rank_and_scale_follow_pefts_choice_of_pattern(module, ranks, alphas, rslora):
    config = AdapterConfig(
        rank=8, alpha=12, rslora=rslora, rank_pattern=ranks, alpha_pattern=alphas, base_model=None
    )  # fmt: skip
    rank = ranks.get(get_pattern_key(ranks, module), 8)
    alpha = alphas.get(get_pattern_key(alphas, module), 12)
    assert config.rank_of(module) == rank
    assert config.scale_of(module) == pytest.approx(alpha / rank**0.5 if rslora else alpha / rank, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_come_as_the_file_has_them(tmp_path, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in factors(seed=5).items()}
    expert = read_adapter(write_adapter(tmp_path / "a", tensors=tensors), "a")
    with expert.open() as read:
        for module in MODULES:
            A, B, scale = read(module)
            assert torch.equal(A, tensors[key_A(module)])
            assert torch.equal(B, tensors[key_B(module)])
            assert (A.dtype, B.dtype, scale) == (dtype, dtype, 2.0)


@pytest.mark.parametrize(
    "form", ["m.lora_{}.weight", "m.lora_{}.default.weight", "base_model.model.m.lora_{}.x.weight"]
)
def test_other_spellings_of_a_tensors_name(tmp_path, form):
    pair = {form.format("A"): torch.ones(2, 3), form.format("B"): torch.ones(5, 2)}
    expert = read_adapter(write_adapter(tmp_path / "a", tensors=pair), "a")
    assert [(name, *shape[:4]) for name, shape in expert.shapes.items()] == [("m", 2, 3, 5, 2.0)]


def test_one_module_of_zeros_among_others_is_allowed(tmp_path):
    tensors = factors()
    tensors[key_B("model.layers.0.self_attn.q_proj")].zero_()
    assert len(read_adapter(write_adapter(tmp_path / "a", tensors=tensors), "a").shapes) == 2


def test_values_are_not_read_unless_asked_for(tmp_path):
    tensors = {key: tensor.fill_(float("nan")) for key, tensor in factors().items()}
    folder = write_adapter(tmp_path / "a", tensors=tensors)
    assert list(read_adapter(folder, "a", check_values=False).shapes) == sorted(MODULES)


def test_a_path_may_start_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_adapter(tmp_path / "a")
    assert locate_adapter("~/a", "a") == tmp_path / "a"


@pytest.mark.parametrize(
    ("source", "repo", "subfolder", "revision"),
    [
        ("org/repo", "org/repo", None, None),
        ("org/repo@v1.0", "org/repo", None, "v1.0"),
        ("org/repo/sql", "org/repo", "sql", None),
        ("org/my.repo_x-1/experts/sql@refs/pr/3", "org/my.repo_x-1", "experts/sql", "refs/pr/3"),
    ],
)
def test_a_hub_id_fetches_only_the_adapters_files(tmp_path, monkeypatch, source, repo, subfolder, revision):
    calls = []
    write_adapter(tmp_path / (subfolder or ""))

    def snapshot_download(repo_id, *, revision, allow_patterns):
        calls.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    expert = read_adapter(source, "sql")
    inside = f"{subfolder}/" if subfolder else ""
    files = ["adapter_config.json", "adapter_model.safetensors", "README.md", "expert.json", "gates.safetensors"]
    files += ["text.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
    initial = [f"{kind}_init/{file}" for kind in ("pissa", "olora", "corda", "lora_ga") for file in files[:2]]
    [(found_repo, found_revision, patterns)] = calls
    assert (found_repo, found_revision) == (repo, revision)
    assert sorted(patterns) == sorted(inside + file for file in files + initial)
    assert expert.origin == source
    assert expert.weights == Path(tmp_path, subfolder or "", "adapter_model.safetensors")


@pytest.mark.parametrize("place", ["here", "on the Hub"])
def test_weights_in_a_pickle_file_are_read_as_peft_reads_them(tmp_path, monkeypatch, place):
    monkeypatch.setenv("SPECTR_CACHE", str(tmp_path / "cache"))
    folder = write_adapter(tmp_path / "a")
    (folder / "tokenizer_config.json").write_text("{}")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    fetched = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **given: fetched.append(given) or str(folder))
    for scale in (1, 2):  # a file that changes is read again
        torch.save(
            {key: scale * value.mT.contiguous().mT for key, value in tensors.items()}, folder / "adapter_model.bin"
        )
        expert = read_adapter(folder if place == "here" else "org/repo", "sql")
        assert load_peft_weights(str(folder)).keys() == tensors.keys()
        for key, value in load_peft_weights(str(folder)).items():
            assert torch.equal(load_file(expert.weights)[key], value)
    assert expert.origin == str(folder if place == "here" else "org/repo")
    assert (expert.weights.parent / "tokenizer_config.json").read_text() == "{}"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ("adapter_config.json", "adapter_model.bin", "tokenizer_config.json")
    )
    assert [given["allow_patterns"] for given in fetched[1::2]] == [["adapter_model.bin"]] * (len(fetched) // 2)
    LibraryStore(tmp_path / "library").add("sql", folder)
    assert ExpertLibrary.open(tmp_path / "library")["sql"].shapes == expert.shapes


def test_a_folder_comes_before_a_hub_id_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    write_adapter(tmp_path / "org" / "repo")
    assert locate_adapter("org/repo", "a") == Path("org/repo")
