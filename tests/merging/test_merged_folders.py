"""What merges leave on disk and in a model: ordinary adapters, and weights with the exact update in them."""

import copy
import json

import pytest
import torch
from dense_merges import UP, K, Q, save_experts
from peft import LoraConfig

from adapters_on_disk import load_with_peft, save_with_peft, tiny_gpt2, tree
from models import close, logits, peft_deltas, peft_model, tiny_llama, tokens, write_adapter
from spectr import ExpertLibrary, Uniform, compose
from spectr.adapters import read_adapter
from spectr.errors import MergeError, SpectrError
from spectr.hashing import file_sha256
from spectr.library import LibraryStore
from spectr.merging import (
    Average,
    Dare,
    Knots,
    LowRank,
    Recipe,
    Ties,
    merge_adapter,
    merge_into,
    merged_modules,
    save_merged_adapter,
    save_merged_model,
)

NAMES = ("amber", "blue", "cyan")
METHODS = [Average(), Ties(), Dare(), Knots()]


def test_an_average_on_disk_answers_as_mu_routing_of_all_experts(tmp_path):
    """Mu-routing weights by the experts of a module, so that all have to adapt the same ones."""
    model = tiny_llama()
    for seed in (1, 2):
        save_with_peft(
            tmp_path / f"e{seed}", copy.deepcopy(model), LoraConfig(r=seed, target_modules=["q_proj"]), seed=seed
        )
    library = ExpertLibrary.open(tmp_path)
    merged = merge_adapter(library, Recipe(experts=("e1", "e2"), method=Average()))
    out = save_merged_adapter(merged, library, tmp_path / "out")
    ids, routed = tokens(), copy.deepcopy(model)
    compose(routed, library, Uniform())
    close(logits(peft_model(model, out), ids), logits(routed, ids), 1e-4)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_an_adapter_is_what_peft_and_we_read(experts, tmp_path, method):
    merged = merge_adapter(experts, Recipe(experts=NAMES, method=method), rank=5)
    out = save_merged_adapter(merged, experts, tmp_path / "new" / "merged")
    theirs = peft_deltas(tiny_llama(), out)
    expert = read_adapter(out, "merged")
    assert sorted(theirs) == sorted(expert.shapes) == sorted(merged.deltas)
    with expert.open() as read:
        for module, delta in merged.deltas.items():
            A, B, scale = read(module)
            assert scale == 1
            assert torch.equal(A, delta.A)
            assert torch.equal(B, delta.B)
            close(theirs[module], delta.dense())
    assert expert.base_model == "tiny"


def test_the_folder_says_what_it_was_made_of(experts, tmp_path):
    recipe = Recipe(experts=("amber", "blue"), method=Dare(density=0.5, seed=7), subtract=("cyan",), strength=0.5)
    merged = merge_adapter(experts, recipe, rank=3)
    out = save_merged_adapter(merged, experts, tmp_path / "out")
    facts = json.loads((out / "expert.json").read_text())
    assert facts["merge"] == {"method": "dare", "density": 0.5, "seed": 7}
    assert [(e["expert"], e["weight"]) for e in facts["experts"]] == [("amber", 0.5), ("blue", 0.5)]
    assert facts["experts"][0]["sha256"] == file_sha256(experts["amber"].weights)
    assert (facts["subtracted"][0]["expert"], facts["strength"]) == ("cyan", 0.5)
    assert facts["ranks"] == dict.fromkeys(sorted((K, Q, UP)), 3)
    assert facts["energy"] == merged.energy
    assert facts["sha256"]["adapter_model.safetensors"] == file_sha256(out / "adapter_model.safetensors")
    card = (out / "README.md").read_text()
    for phrase in (
        "base_model: tiny",
        "| amber | 0.5 |",
        "Method: dare (density 0.5, seed 7)",
        "0.5 times the mean of cyan",
    ):
        assert phrase in card


def test_the_same_recipe_writes_the_same_bytes(experts, tmp_path):
    recipe = Recipe(experts=NAMES, method=Dare())
    first, again = (
        save_merged_adapter(merge_adapter(experts, recipe), experts, tmp_path / name / "merged") for name in "ab"
    )
    assert tree(first) == tree(again)


def test_a_merged_adapter_goes_into_a_library(experts, tmp_path):
    out = save_merged_adapter(merge_adapter(experts, Recipe(experts=NAMES)), experts, tmp_path / "out")
    store = LibraryStore(tmp_path / "library")
    store.add("merged", out)
    assert store.verify() == {"merged": None}


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_module_that_comes_out_zero_is_left_out(tmp_path, method):
    """Both experts are zero there; elsewhere they are not."""
    zero = (torch.zeros(4, 32), torch.zeros(32, 4))
    for name in ("a", "b"):
        alive = (torch.ones(4, 32), torch.ones(16, 4))
        write_adapter(tmp_path / name, {Q: zero, K: alive})
    merged = merge_adapter(ExpertLibrary.open(tmp_path), Recipe(experts=("a", "b"), method=method))
    assert list(merged.deltas) == [K]


def test_a_merge_that_is_zero_everywhere_is_refused(tmp_path):
    library = save_experts(tmp_path)
    copied = library.with_expert("amber-again", tmp_path / "amber")
    with pytest.raises(MergeError, match="amber is zero everywhere") as caught:
        merge_adapter(copied, Recipe(experts=("amber",), method=Average(), subtract=("amber-again",)))
    assert "check the weights and --subtract" in str(caught.value)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_into_the_base_goes_the_exact_update_and_comes_out_again(experts, method):
    model, recipe = tiny_llama(), Recipe(experts=NAMES, method=method)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    held = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    exact = {m: d.dense() if isinstance(d, LowRank) else d for m, d, *_ in merged_modules(experts, recipe)}
    merged = merge_into(model, experts, recipe)
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        close(weight, before[name] + exact[module] if module in exact else before[name], 1e-6)
    assert merged.change[Q] == pytest.approx(float(exact[Q].norm() / before[f"{Q}.weight"].norm()), rel=1e-4)
    merged.undo()
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == held
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_model_of_half_precision_is_rounded_once(experts):
    model, recipe = tiny_llama().bfloat16(), Recipe(experts=("amber",), method=Average())
    before = model.get_submodule(Q).weight.float().clone()
    delta = next(d.dense() for m, d, *_ in merged_modules(experts, recipe) if m == Q)
    merge_into(model, experts, recipe, undoable=False)
    assert torch.equal(model.get_submodule(Q).weight, (before + delta).bfloat16())


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_layers_that_keep_their_weight_transposed(tmp_path, fan_in_fan_out):
    """GPT-2's Conv1D; its ``c_proj`` of attention is square, so that a wrong layout would pass for a right one."""
    model = tiny_gpt2()
    for seed in (1, 2):
        config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=fan_in_fan_out)
        save_with_peft(tmp_path / f"e{seed}", copy.deepcopy(model), config, seed=seed)
        raw = json.loads((tmp_path / f"e{seed}" / "adapter_config.json").read_text())
        (tmp_path / f"e{seed}" / "adapter_config.json").write_text(
            json.dumps({**raw, "fan_in_fan_out": fan_in_fan_out})
        )
    library, recipe = ExpertLibrary.open(tmp_path), Recipe(experts=("e1", "e2"), method=Ties(density=0.5))
    out = save_merged_adapter(merge_adapter(library, recipe, rank=8), library, tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] == fan_in_fan_out
    ids = torch.randint(0, 17, (2, 5), generator=torch.Generator().manual_seed(0))
    adapted = load_with_peft(out, copy.deepcopy(model))
    before = logits(model, ids)
    merge_into(model, library, recipe)
    close(logits(model, ids), logits(adapted, ids), 1e-4)
    assert (logits(model, ids) - before).abs().max() > 1e-2


def test_a_merged_model_on_disk_answers_as_it_did_in_memory(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from text_model import make_model, make_tokenizer, save_experts

    save_experts(tmp_path / "experts", ("one", "two"))
    library, model = ExpertLibrary.open(tmp_path / "experts"), make_model()
    merged = merge_into(model, library, Recipe(experts=("one", "two")))
    out = save_merged_model(model, make_tokenizer(), merged, library, tmp_path / "out", base_model="tiny")
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = tokens() % 20
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert AutoTokenizer.from_pretrained(out).tokenize("red blue") == ["red", "blue"]
    facts = json.loads((out / "merge.json").read_text())
    assert facts["change"] == dict(merged.change)
    assert facts["dtype"] == "float32"
    assert "library_name: transformers" in (out / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_written_halfway_is_taken_away(experts, tmp_path, monkeypatch):
    from spectr.merging import publish

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(publish, "write_adapter", fail)
    with pytest.raises(OSError, match="disk full"):
        save_merged_adapter(merge_adapter(experts, Recipe(experts=NAMES)), experts, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def refuses(call) -> str:
    with pytest.raises(SpectrError) as caught:
        call()
    return str(caught.value)


def test_sizes_and_experts_are_checked_before_anything_is_read(experts):
    message = refuses(lambda: merge_adapter(experts, Recipe(experts=("ambr", "dog")), rank=0, energy=1.5))
    assert "the experts cannot be merged: 4 problems" in message
    for phrase in ("rank=0", "energy=1.5", "unknown expert 'ambr'", "did you mean 'amber'?", "unknown expert 'dog'"):
        assert phrase in message


def test_experts_of_different_base_models_are_refused(experts, tmp_path):
    other = write_adapter(tmp_path / "other", {Q: (torch.ones(2, 16), torch.ones(24, 2))})
    message = refuses(lambda: merge_adapter(experts.with_expert("other", other), Recipe(experts=("amber", "other"))))
    assert "experts 'amber' and 'other' are for different base models" in message
    assert f"{Q} is 32 -> 32 in one, 16 -> 24 in the other" in message
    assert "remove one of them" in message


def test_a_folder_in_use_is_left_alone(experts, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    merged = merge_adapter(experts, Recipe(experts=NAMES))
    message = refuses(lambda: save_merged_adapter(merged, experts, tmp_path / "full"))
    assert f"{tmp_path / 'full'} is not empty" in message
    assert "choose another --out" in message
    assert "is a file" in refuses(lambda: save_merged_adapter(merged, experts, tmp_path / "full" / "mine.txt"))
    assert "cannot be created in" in refuses(
        lambda: save_merged_adapter(merged, experts, tmp_path / "full" / "mine.txt" / "x")
    )
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def tied():
    model = tiny_llama()
    model.get_submodule(Q).weight = model.get_submodule(OTHER_Q).weight
    return model


def quantised():
    model = tiny_llama()
    model.get_submodule(Q).weight = torch.nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    return model


OTHER_Q = Q.replace("0", "1")
NOT_INTO = {
    "another model": (lambda: tiny_llama(hidden_size=16), "does not fit the sizes of"),
    "tied": (tied, f"{Q} shares its weight with {OTHER_Q}, which the merge would change too"),
    "quantised": (quantised, f"the weights of {Q} cannot be changed: they are quantised, or not in memory"),
    "on no device": (lambda: tiny_llama().to("meta"), "not in memory"),
}


@pytest.mark.parametrize("case", NOT_INTO)
def test_a_model_that_cannot_take_the_update_is_refused_unchanged(experts, case):
    make, phrase = NOT_INTO[case]
    model = make()
    held = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert phrase in refuses(lambda: merge_into(model, experts, Recipe(experts=NAMES)))
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == held


def test_a_composed_model_is_refused(experts):
    model = tiny_llama()
    routed = compose(model, experts, Uniform())
    assert "call routed.remove() first" in refuses(lambda: merge_into(model, experts, Recipe(experts=NAMES)))
    routed.remove()
    merge_into(model, experts, Recipe(experts=NAMES))


def test_unknown_experts_are_reported_before_the_model_is_looked_at(experts):
    assert "unknown expert 'dog'" in refuses(lambda: merge_into(tiny_llama(), experts, Recipe(experts=("dog",))))


def test_without_the_weights_from_before_nothing_is_undone(experts):
    merged = merge_into(tiny_llama(), experts, Recipe(experts=NAMES), undoable=False)
    assert "were not kept" in refuses(merged.undo)


def test_an_interrupted_merge_leaves_the_weights_as_they_were(experts):
    model, before = tiny_llama(), tiny_llama().state_dict()

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_into(model, experts, Recipe(experts=NAMES), progress=stop)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_weight_of_zero_becomes_the_update(experts):
    model, recipe = tiny_llama(), Recipe(experts=NAMES, method=Average())
    torch.nn.init.zeros_(model.get_submodule(K).weight)
    merged = merge_into(model, experts, recipe)
    [delta] = [one.delta.dense() for one in merged_modules(experts, recipe) if one.module == K]
    close(model.get_submodule(K).weight, delta, 1e-6)
    assert merged.change[K] == float("inf")
