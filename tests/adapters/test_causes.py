"""Folders that are no adapters of PEFT: the real cause and what to do."""

import json

import pytest

from adapters_on_disk import assert_says, write_adapter
from spectr.adapters import read_adapter
from spectr.errors import AdapterError, LibraryError
from spectr.library import ExpertLibrary

FOLDERS = {
    "several adapters": (["a/adapter_config.json", "b/adapter_config.json"], "adapters in subfolders: a, b", "/a"),
    "one adapter": (["sql/adapter_config.json"], "several adapters in subfolders: sql", "/sql"),
    "checkpoints": (
        ["checkpoint-50/adapter_config.json", "checkpoint-200/adapter_config.json"],
        "the checkpoints of a training run: checkpoint-200, checkpoint-50",
        "/checkpoint-200",
    ),
    "mlx-lm": (["adapter_config.json", "adapters.safetensors"], "is an mlx-lm adapter", "mlx_lm.fuse"),
    "mlx-lm, checkpoints": (["0000100_adapters.safetensors"], "is an mlx-lm adapter", "mlx_lm.fuse"),
    "shards": (["adapter_model.safetensors.index.json"], "holds its weights in several files", "with PEFT"),
    "diffusers": (["pytorch_lora_weights.safetensors"], "is a diffusers LoRA", "for a transformers model"),
    "llama.cpp": (["lora.gguf"], "holds a llama.cpp GGUF file", "the PEFT adapter"),
    "DeepSpeed": (["adapter_config.json", "zero_to_fp32.py"], "is a DeepSpeed checkpoint", "zero_to_fp32.py"),
    "a whole model": (["config.json", "model.safetensors"], "holds a whole model", "spectr extract FOLDER --base"),
    "pickled": (
        ["adapter_config.json", "adapter_model.pt"],
        "only in adapter_model.pt",
        "with PEFT",
    ),
}


@pytest.mark.parametrize(("files", "given", "do"), FOLDERS.values(), ids=FOLDERS.keys())
@pytest.mark.parametrize("place", ["here", "on the Hub"])
def test_the_cause_is_reported_by_the_files(tmp_path, monkeypatch, files, given, do, place):
    for file in files if place == "here" else ():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: files)
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path if place == "here" else "org/repo", "sql")
    assert_says(caught.value, given=("expert 'sql'", given), expected="adapter_model.safetensors", do=do)


def test_the_cause_is_reported_by_the_configuration(tmp_path):
    folder = write_adapter(tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 2}}))
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, "sql")
    assert_says(caught.value, given=("is an mlx-lm adapter",), expected="plain LoRA", do="mlx_lm.fuse")


def test_settings_that_a_configuration_omits_have_pefts_defaults(tmp_path):
    folder = write_adapter(tmp_path, rank=8)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "merge_weights": True}))
    assert {shape.scale for shape in read_adapter(folder, "sql").shapes.values()} == {1.0}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "enable_lora": [True, False, True]}))
    with pytest.raises(AdapterError, match="enable_lora is set"):
        read_adapter(folder, "sql")


def test_an_adapter_with_others_in_folders_is_read(tmp_path):
    write_adapter(tmp_path)
    write_adapter(tmp_path / "checkpoint-10")
    assert len(read_adapter(tmp_path, "sql").shapes) == 2


@pytest.mark.parametrize(
    ("folders", "given", "do"),
    [
        ([".", "second"], "is an adapter itself and holds others in subfolders (second)", "from_adapters"),
        ([".", "checkpoint-1"], "is an adapter itself", "spectr library add NAME FOLDER"),
        (["checkpoint-9", "checkpoint-10"], "the checkpoints of one training run", "checkpoint-10 --library LIBRARY"),
    ],
)
def test_adapters_that_are_no_experts_of_one_library(tmp_path, folders, given, do):
    for folder in folders:
        write_adapter(tmp_path / folder)
    with pytest.raises(LibraryError) as caught:
        ExpertLibrary.open(tmp_path)
    assert_says(caught.value, given=(given,), expected="a folder of experts", do=do)
