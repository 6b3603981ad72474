"""``spectr extract`` and ``spectr rerank`` as their user meets them."""

import pytest
import torch
from checkpoints import linear_change, rewrite, save_pair

from models import peft_adapter, tiny_llama
from spectr.adapters import read_adapter
from spectr.library import LibraryStore


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_pair(root, tiny_llama(), linear_change(3))
    peft_adapter(tiny_llama(), root / "adapter", 1, rank=6)
    return root


def test_extract_prints_a_table_and_ends_with_the_path(spectr, world, tmp_path):
    expert, picture, drawing = tmp_path / "expert", tmp_path / "energy.png", tmp_path / "energy.svg"
    files = ("--out", expert, "--png", picture, "--svg", drawing)
    code, text, notes = spectr("extract", world / "tuned", "--base", world / "base", "--rank", 2, *files)
    assert code == 0
    assert "kept, % (least / median / most)" in text
    assert "change / weight" in text
    assert text.strip().endswith(f"expert: {expert}")
    assert "factorising: 14 of 14" in notes
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in drawing.read_text()
    assert read_adapter(expert, "e").base_model == str(world / "base")


def test_an_extracted_expert_goes_into_a_library_and_is_reranked(spectr, world, tmp_path):
    given = ("extract", world / "tuned", "-b", world / "base", "--energy", 0.999, "-o", tmp_path / "expert")
    assert spectr(*given)[0] == 0
    library = tmp_path / "library"
    LibraryStore(library).add("mine", tmp_path / "expert")
    code, text, _ = spectr("rerank", "mine", "--library", library, "--rank", 1, "--out", tmp_path / "small")
    assert code == 0
    assert text.strip().endswith(f"expert: {tmp_path / 'small'}")
    assert read_adapter(tmp_path / "small", "s").ranks == (1,)
    assert "change / weight" not in text


def test_rerank_takes_a_folder(spectr, world, tmp_path):
    code, text, _ = spectr("rerank", world / "adapter", "--energy", 0.5, "--out", tmp_path / "small")
    assert code == 0
    assert "modules; expert:" in text


def test_rerank_names_the_experts_there_are(spectr, world, tmp_path):
    code, _, message = spectr("rerank", "nobody", "--library", world, "--rank", 1, "--out", tmp_path / "small")
    assert code == 2
    assert "unknown expert 'nobody'" in message


def test_what_is_left_out_is_said(spectr, tmp_path):
    base, tuned, _ = save_pair(tmp_path, tiny_llama(), linear_change(2))
    rewrite(tuned, lambda t: {**t, **{n: v + 1 for n, v in t.items() if "norm" in n}, "new": torch.ones(2)})
    given = ("extract", tuned, "--base", base, "--rank", 2, "--out", tmp_path / "expert")
    code, _, notes = spectr(*given)
    assert code == 0
    notes = " ".join(notes.split())
    assert "LoRA cannot hold it: model.layers.0.input_layernorm.weight (norm, change / size 1.0e+00)" in notes
    assert "and 1 more (see the card)" in notes
    code, _, message = spectr(*given[:-1], tmp_path / "second", "--strict")
    assert code == 2
    assert "6 parameters changed that LoRA cannot hold" in message
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "neither rank nor energy"),
        (("--rank", 2, "--energy", 0.5), "both rank"),
        (("--rank", 2, "--method", "fast"), "method='fast'"),
        (("--rank", 2, "--png", "energy.jpg"), "does not end in .png"),
        (("--rank", 2, "--svg", "energy.png"), "does not end in .svg"),
        (("--rank", 2, "--max-memory", 1e-6), "--max-memory"),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(spectr, world, tmp_path, words, says):
    given = ("extract", world / "tuned", "--base", world / "base", "--out", tmp_path / "expert")
    code, _, message = spectr(*given, *words)
    assert code == 2
    assert says in message
    assert list(tmp_path.iterdir()) == []


def test_the_default_base_is_the_default_model(spectr, world, tmp_path, monkeypatch):
    monkeypatch.setattr("spectr.models.fetch_default_model", lambda say: world / "base")
    assert spectr("extract", world / "tuned", "--rank", 1, "--out", tmp_path / "expert")[0] == 0
    assert read_adapter(tmp_path / "expert", "e").base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("command", ["extract", "rerank"])
def test_help(spectr, command):
    code, text, notes = spectr(command, "--help")
    assert (code, notes) == (0, "")
    assert f"spectr {command}" in text
