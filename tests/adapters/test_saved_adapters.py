"""What adapters hold besides factors: read by name, refused where the file does not go with its configuration."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PromptTuningConfig, TrainableTokensConfig
from safetensors.torch import load_file, save_file

from adapters_on_disk import assert_says, factors, load_with_peft, save_with_peft, tiny_llama, write_adapter
from spectr.adapters import read_adapter
from spectr.adapters.adapter_config import _CONVERTIBLE
from spectr.errors import AdapterError, ExtractionError, MergeError
from spectr.extraction import Truncation, rerank
from spectr.library import ExpertLibrary
from spectr.merging.recipe import expert_faults

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
DELTA = f"base_model.model.{EMBEDDING}.token_adapter.trainable_tokens_delta"


def refusal(folder) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, "sql")
    return caught.value


def test_trained_modules_are_listed_with_their_parameters(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[HEAD, "embed_tokens"])
    expert = read_adapter(save_with_peft(tmp_path, tiny_llama(), config), "sql")
    assert set(expert.saved) == {HEAD, EMBEDDING}
    assert expert.saved[HEAD].whole["weight"].shape == (17, 8)
    assert not expert.saved[HEAD].whole["weight"].shared
    assert expert.parameters == sum(s.rank * (s.inputs + s.outputs) for s in expert.shapes.values()) + 2 * 17 * 8
    with expert.open_saved() as read:
        assert read(expert.saved[HEAD].whole["weight"].key).shape == (17, 8)


@pytest.mark.parametrize("prefix", ["base_model.model._orig_mod.", "_orig_mod.base_model.model."])
def test_names_that_compile_leaves_are_read_of_trained_modules_too(tmp_path, prefix):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[HEAD], trainable_token_indices=[3])
    folder = save_with_peft(tmp_path, tiny_llama(), config)
    want = read_adapter(folder, "sql")
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {key.replace("base_model.model.", prefix): tensor for key, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    expert = read_adapter(folder, "sql")
    assert expert.modules == want.modules
    assert expert.parameters == want.parameters


def test_trained_rows_and_factors_of_an_embedding_are_listed(tmp_path):
    rows = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 1])
    assert read_adapter(save_with_peft(tmp_path / "a", tiny_llama(), rows), "sql").saved[EMBEDDING].rows.tokens == (
        3,
        1,
    )
    both = LoraConfig(target_modules=["q_proj", "embed_tokens"], r=4, lora_alpha=6)
    found = read_adapter(save_with_peft(tmp_path / "b", tiny_llama(), both), "sql").saved[EMBEDDING]
    assert found.factors[2:] == (4, 17, 8, 1.5)
    assert found.whole["weight"].shared


@pytest.mark.parametrize("rank", [4, 3])
def test_ranks_of_embeddings_are_compared_where_peft_loads_them(tmp_path, rank):
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], rank_pattern={"embed_tokens": 4})
    folder = save_with_peft(tmp_path, tiny_llama(), config)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"rank_pattern": {"embed_tokens": rank}}
    path.write_text(json.dumps(settings))
    if rank == 4:
        load_with_peft(folder, tiny_llama())
        assert read_adapter(folder, "sql").saved[EMBEDDING].factors.rank == 4
        path.write_text(json.dumps(settings | {"target_modules": ["q_proj"], "rank_pattern": {}}))
        load_with_peft(folder, tiny_llama())
        assert EMBEDDING in read_adapter(folder, "sql").saved  # not targeted: left out when a model is known
        return
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_with_peft(folder, tiny_llama())
    assert_says(refusal(folder), given=("has factors of rank 4", "says rank 3"), expected="", do="retrain it")


def test_an_adapter_of_trained_tokens_alone_is_one_of_a_library(tmp_path):
    from spectr.library import LibraryStore

    folder = save_with_peft(tmp_path / "words", tiny_llama(), TrainableTokensConfig(token_indices=[3, 1]))
    entry = LibraryStore(tmp_path / "library").add("words", folder)
    assert (entry.modules, entry.ranks, entry.targets, entry.parameters) == (1, (), ("embed_tokens",), 16)
    assert ExpertLibrary.open(tmp_path / "library")["words"].saved[EMBEDDING].rows.tokens == (3, 1)


WRONG = {
    "other tokens": (
        {**factors(), DELTA: torch.ones(2, 8)},
        {"trainable_token_indices": [1, 2, 3]},
        f"{DELTA} has the shape (2, 8) but the configuration lists 3 trained tokens",
    ),
    "no tokens": (
        {**factors(), DELTA: torch.ones(2, 8)},
        {},
        f"{DELTA} has the shape (2, 8) but the configuration lists 0 trained tokens",
    ),
    "half a pair": (
        {**factors(), f"{EMBEDDING}.lora_embedding_A": torch.ones(2, 17)},
        {},
        f"{EMBEDDING} has only one factor",
    ),
    "no pair": (
        {
            **factors(),
            f"{EMBEDDING}.lora_embedding_A": torch.ones(2, 17),
            f"{EMBEDDING}.lora_embedding_B": torch.ones(8, 3),
        },
        {},
        f"{EMBEDDING} has factors of shapes (2, 17) and (8, 3), which do not match",
    ),
    "another rank": (
        {
            **factors(),
            f"{EMBEDDING}.lora_embedding_A": torch.ones(3, 17),
            f"{EMBEDDING}.lora_embedding_B": torch.ones(8, 3),
        },
        {"rank_pattern": {"v_proj": 2, "embed_tokens": 5}},
        f"{EMBEDDING} has factors of rank 3 but the configuration says rank 5",
    ),
    "a vector of nobody": (
        {**factors(), "model.norm.weight": torch.ones(8)},
        {},
        "model.norm.weight is not a LoRA factor",
    ),
    "words for tokens": (
        factors(),
        {"trainable_token_indices": ["a"]},
        "trained tokens are ['a'], not token ids",
    ),
    "a token twice": (
        factors(),
        {"trainable_token_indices": [1, 1]},
        "a trained token is listed twice",
    ),
    "numbers for modules": (factors(), {"modules_to_save": [1]}, "modules_to_save is [1]"),
    "a number of modules": (factors(), {"modules_to_save": 5}, "modules_to_save is 5"),
    "one name as modules": (factors(), {"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
    "one name as parameters": (factors(), {"target_parameters": "weight"}, "target_parameters is 'weight'"),
    "one token": (factors(), {"trainable_token_indices": 3}, "trainable_token_indices is 3"),
    "a number of a base": (factors(), {"base_model_name_or_path": 7}, "base_model_name_or_path is 7"),
}


@pytest.mark.parametrize(("tensors", "config", "given"), WRONG.values(), ids=WRONG.keys())
def test_a_file_that_does_not_go_with_its_configuration_is_refused(tmp_path, tensors, config, given):
    error = refusal(write_adapter(tmp_path / "sql", tensors=tensors, **config))
    assert_says(error, given=("expert 'sql' cannot be routed exactly", given), expected="", do="retrain it")


def test_another_kind_of_adapter_is_refused_with_what_makes_lora_of_it(tmp_path):
    folder = save_with_peft(tmp_path / "loha", tiny_llama(), LoHaConfig(target_modules=["q_proj"]))
    given = ("peft_type is 'LOHA', not 'LORA'",)
    assert_says(refusal(folder), given=given, expected="plain LoRA", do="peft.tuners.lora.conversion.save_as_lora(")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    folder = save_with_peft(tmp_path / "prompt", tiny_llama(), prompt)
    assert_says(refusal(folder), given=("'PROMPT_TUNING'",), expected="plain LoRA", do="retrain it as plain LoRA")


def test_the_kinds_that_peft_makes_lora_of_are_those_that_the_installed_one_does():
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer

    converts = set()
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        layers = [
            one for one in _below(BaseTunerLayer) if one.__module__.startswith(tuner.__module__.rsplit(".", 1)[0])
        ]
        own = [
            layer for layer in layers if layer.supports_lora_conversion is not BaseTunerLayer.supports_lora_conversion
        ]
        converts |= {kind.value} if own and kind.value != "LORA" else set()
    assert converts == _CONVERTIBLE


def _below(kind):
    for other in kind.__subclasses__():
        yield other
        yield from _below(other)


def test_merging_and_lower_ranks_take_factors_alone(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[HEAD])
    save_with_peft(tmp_path / "sql", tiny_llama(), config)
    library = ExpertLibrary.open(tmp_path)
    [fault] = expert_faults(library, ["sql"])
    assert isinstance(fault, MergeError)
    said = "expert 'sql' has trained lm_head besides LoRA's factors, and merging reads factors only"
    assert_says(fault, given=(said,), expected="LoRA factors of linear", do="omit this expert")
    with pytest.raises(ExtractionError, match="and a lower rank reads factors only"):
        rerank(library["sql"], tmp_path / "less", Truncation(rank=1))
