"""Experts that are far too large are found."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from beyond_lora import moved_adapter
from models import dense_deltas, peft_adapter
from spectr import ExpertLibrary
from spectr.adapters import read_adapter
from spectr.errors import AdapterError
from spectr.layers.base_layers import ModelLayers
from spectr.serving.outliers import outlier_scores, outliers_among, spectral_norm
from spectr.shipped import shipped_experts
from text_model import make_model


@pytest.fixture
def root(tmp_path):
    for seed, name in enumerate(("ants", "bees", "cats", "dogs", "eels"), start=1):
        peft_adapter(make_model(), tmp_path / name, seed, rank=4)
    return tmp_path


def scale(folder, factor):
    path = folder / "adapter_model.safetensors"
    factors = load_file(path)
    save_file({key: t * (factor if "lora_B" in key else 1) for key, t in factors.items()}, path)


def test_the_norm_is_that_of_the_dense_update(root):
    deltas = dense_deltas(root / "ants").values()
    norms = torch.stack([torch.linalg.matrix_norm(delta, ord=2) for delta in deltas])
    expected = float(norms.square().mean().sqrt())
    assert spectral_norm(ExpertLibrary.open(root)["ants"]) == pytest.approx(expected, rel=1e-5)


def test_factors_that_depend_on_the_base_are_measured_on_it(tmp_path):
    expert = read_adapter(moved_adapter(make_model(), tmp_path, 1, use_dora=True, target_modules=["q_proj"]), "ants")
    base = ModelLayers(make_model())
    with expert.open_on(base) as read:
        deltas = [u.factors.scale * u.factors.B @ u.factors.A for u in map(read, expert.shapes)]
    norms = torch.stack([torch.linalg.matrix_norm(delta, ord=2) for delta in deltas])
    assert spectral_norm(expert, base) == pytest.approx(float(norms.square().mean().sqrt()), rel=1e-5)
    with pytest.raises(AdapterError, match="no plain LoRA adapter"):
        spectral_norm(expert)


@pytest.mark.parametrize("factor", [0.2, 1.0, 4.0])
def test_similar_or_small_experts_are_no_outliers(root, factor):
    scale(root / "cats", factor)
    assert outliers_among(ExpertLibrary.open(root)[name] for name in ("ants", "bees", "cats", "dogs", "eels")) == {}


@pytest.mark.parametrize("factor", [10.0, 1000.0])
def test_a_huge_one_is(root, factor):
    scale(root / "cats", factor)
    found = outliers_among(ExpertLibrary.open(root)[name] for name in ("ants", "bees", "cats", "dogs", "eels"))
    assert set(found) == {"cats"}
    assert found["cats"] >= 3.5


def test_a_broken_one_is_however_few_there_are():
    assert outlier_scores({"a": float("nan"), "b": 1.0}) == {"a": float("inf")}
    assert outlier_scores({"a": float("inf"), "b": 1.0, "c": 1.0, "d": 1.1}) == {"a": float("inf")}


def test_the_score_is_the_modified_z_score():
    found = outlier_scores({"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0, "e": 2.0**30})
    assert found == {"e": pytest.approx(0.6745 * 28 / 1)}


def test_no_shipped_expert_is_an_outlier():
    library = ExpertLibrary.open(shipped_experts())
    assert outliers_among(library[name] for name in library) == {}
