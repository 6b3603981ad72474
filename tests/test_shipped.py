"""The experts that come with the package."""

import json

import pytest
import torch

from spectr import ExpertLibrary, Spectr
from spectr.adapters import read_gates
from spectr.errors import MissingExtraError
from spectr.layers import make_plan
from spectr.library import LibraryStore
from spectr.shipped import shipped_experts
from spectr.tasks import shipped_tasks

STORE = LibraryStore(shipped_experts())


def card(entry) -> dict:
    return json.loads((STORE.root / entry.folder / "expert.json").read_text(encoding="utf-8"))


def test_all_are_as_they_were_added():
    assert {name: fault for name, fault in STORE.verify().items() if fault} == {}


def test_they_are_in_bfloat16_and_small_enough_to_ship():
    assert sum(file.stat().st_size for file in STORE.root.rglob("*") if file.is_file()) < 50e6
    library = ExpertLibrary.open(STORE.root)
    for name in library:
        with library[name].open() as read:
            assert read(next(iter(library[name].shapes))).A.dtype is torch.bfloat16


def test_they_fit_all_210_linear_layers_of_the_default_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3))
    library = ExpertLibrary.open(STORE.root)
    plan = make_plan(model, [library[name] for name in library], Spectr())
    assert len(plan.modules) == 210
    assert set(plan.modules.values()) == {library.names}


@pytest.mark.parametrize("entry", STORE.entries, ids=lambda entry: entry.name)
def test_each_is_better_than_the_base_model_and_the_majority_and_has_a_task(entry):
    facts = card(entry)
    assert entry.name in shipped_tasks()
    assert facts["accuracy_after"] > facts["accuracy_before"]
    if facts["majority"] is not None:
        assert facts["accuracy_after"] > facts["majority"]


def test_each_has_a_seed_of_its_own():
    seeds = [card(entry)["settings"]["seed"] for entry in STORE.entries]
    assert len(set(seeds)) == len(seeds)


def test_each_has_gates_that_differ_from_all_others_and_a_description():
    library = ExpertLibrary.open(STORE.root)
    gates = {name: read_gates(library[name]) for name in library}
    assert set(library.descriptions) == set(library.names)
    for module in gates["sst2"]:
        stacked = torch.stack([gates[name][module] for name in library])
        assert (stacked.abs().amax(1) > 0).all()
        cosines = torch.nn.functional.cosine_similarity(stacked[:, None], stacked[None], dim=-1)
        assert (cosines.fill_diagonal_(0) < 0.999).all()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """No checkout: where packages are installed, empty as yet."""
    monkeypatch.setattr("spectr.shipped._REPOSITORY", tmp_path / "lib")
    monkeypatch.setattr("spectr.shipped.DISTRIBUTION", "experts-of-a-test")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    return tmp_path / "site-packages"


def test_an_installed_package_finds_the_distribution_of_experts(installed):
    facts = installed / "experts_of_a_test-0.1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.4\nName: experts-of-a-test\nVersion: 0.1.0\n")
    assert shipped_experts() == installed / "spectr_experts"


def test_without_a_checkout_and_the_distribution_the_error_names_the_extra(installed):
    with pytest.raises(MissingExtraError, match="library of shipped experts needs the extra 'demo'"):
        shipped_experts()


@pytest.mark.parametrize("words", [("library", "list"), ("generate", "who"), ("merge", "sst2", "--out", "merged")])
def test_commands_report_that_the_experts_are_missing(installed, spectr, words):
    code, _, err = spectr(*words)
    assert code == 2
    assert 'pip install "spectr-lora[demo]", or name your own library with --library' in err
