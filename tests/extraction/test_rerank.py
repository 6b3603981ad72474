"""Experts at fewer ranks, against the dense SVD of what PEFT says that they add."""

import json

import pytest
import torch
from checkpoints import updates

from adapters_on_disk import assert_says, tree
from models import logits, peft_adapter, peft_deltas, peft_model, tiny_llama, tokens
from spectr.adapters import read_adapter
from spectr.errors import ExtractionError
from spectr.extraction import Truncation, rerank


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapters of rank 6, one with scale 1, rsLoRA and ranks of its own."""
    root, model = tmp_path_factory.mktemp("adapters"), tiny_llama()
    peft_adapter(model, root / "plain", 1, rank=6)
    odd = {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9}}
    peft_adapter(model, root / "odd", 2, rank=6, alpha_pattern={"k_proj": 5}, **odd)
    return root


def best(delta, rank):
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank], S


@pytest.mark.parametrize("name", ["plain", "odd"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_nearest_update_of_that_rank(adapters, tmp_path, name, rank):
    report = rerank(read_adapter(adapters / name, name), tmp_path / "small", Truncation(rank=rank), dtype="float32")
    deltas, found = peft_deltas(tiny_llama(), adapters / name), updates(tmp_path / "small")
    assert set(found) == set(deltas)
    for kept in report.modules:
        nearest, S = best(deltas[kept.module], rank)
        torch.testing.assert_close(found[kept.module], nearest, rtol=0, atol=1e-4 * float(nearest.abs().max()))
        assert kept.rank == min(rank, int((1e-6 * S[0] < S).sum()))
        assert kept.share == pytest.approx(float(S[:rank].square().sum() / S.square().sum()), abs=1e-5)


def test_a_rank_between_those_of_the_modules_pads_none(adapters, tmp_path):
    expert = read_adapter(adapters / "odd", "odd")
    report = rerank(expert, tmp_path / "small", Truncation(rank=7), dtype="float32")
    for kept in report.modules:
        assert kept.rank == min(7, expert.shapes[kept.module].rank)
    peft, ids = peft_model(tiny_llama(), tmp_path / "small"), tokens()
    changed = [k.module for k in report.modules if k.share < 1 - 1e-6]
    assert changed == ["model.layers.1.mlp.up_proj"]
    deltas = peft_deltas(tiny_llama(), tmp_path / "small")
    for module, update in updates(tmp_path / "small").items():
        torch.testing.assert_close(deltas[module].double(), update, rtol=0, atol=1e-5 * float(update.abs().max()))
    assert torch.isfinite(logits(peft, ids)).all()


def test_energy_of_one_keeps_all_and_drops_empty_directions(adapters, tmp_path):
    from safetensors.torch import load_file, save_file

    from models import write_adapter

    folder = write_adapter(
        tmp_path / "padded", {"model.layers.0.self_attn.q_proj": (torch.zeros(4, 8), torch.zeros(8, 4))}
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    for tensor in tensors.values():
        tensor[:2, :2] = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    save_file(tensors, folder / "adapter_model.safetensors")
    report = rerank(read_adapter(folder, "padded"), tmp_path / "small", Truncation(energy=1.0))
    assert [(kept.rank, kept.share) for kept in report.modules] == [(2, pytest.approx(1))]


def test_energy_takes_the_fewest(adapters, tmp_path):
    report = rerank(read_adapter(adapters / "plain", "p"), tmp_path / "small", Truncation(energy=0.7), dtype="float32")
    deltas = peft_deltas(tiny_llama(), adapters / "plain")
    for kept in report.modules:
        S = torch.linalg.svdvals(deltas[kept.module].double()).square()
        assert kept.rank == int((S.cumsum(0) / S.sum() < 0.7).sum()) + 1


def test_the_configuration_keeps_its_targets_and_the_source_is_named(adapters, tmp_path):
    rerank(read_adapter(adapters / "odd", "odd"), tmp_path / "small", Truncation(rank=2), name="tiny")
    old, new = (json.loads((f / "adapter_config.json").read_text()) for f in (adapters / "odd", tmp_path / "small"))
    assert new["target_modules"] == old["target_modules"]
    assert (new["r"], new["lora_alpha"], new["use_rslora"], new["rank_pattern"]) == (2, 2, False, {})
    data = json.loads((tmp_path / "small" / "expert.json").read_text())
    assert data["name"] == "tiny"
    assert data["origin"]["source"]["expert"] == "odd"
    assert len(data["origin"]["source"]["adapter_model.safetensors sha256"]) == 64
    with read_adapter(tmp_path / "small", "s").open() as read:
        assert read("model.layers.0.self_attn.q_proj").A.dtype == torch.bfloat16


def test_a_module_without_an_update_stays_one(adapters, tmp_path):
    from models import write_adapter

    modules = {"model.layers.0.self_attn.q_proj": (torch.randn(3, 8), torch.zeros(8, 3))}
    modules["model.layers.0.self_attn.k_proj"] = (torch.randn(3, 8), torch.randn(8, 3))
    expert = read_adapter(write_adapter(tmp_path / "half", modules), "half")
    report = rerank(expert, tmp_path / "small", Truncation(rank=2))
    assert {kept.module.rpartition(".")[2]: kept.rank for kept in report.modules} == {"q_proj": 1, "k_proj": 2}
    assert report.share == pytest.approx(next(k.share for k in report.modules if "k_proj" in k.module))


@pytest.mark.parametrize(("asked", "says"), [({"rank": 6}, "rank 6"), ({"energy": 1.0}, "a share of 1")])
def test_what_would_not_get_smaller_is_refused(adapters, tmp_path, asked, says):
    before = tree(tmp_path)
    with pytest.raises(ExtractionError) as caught:
        rerank(read_adapter(adapters / "plain", "plain"), tmp_path / "small", Truncation(**asked))
    assert_says(
        caught.value,
        given=(f"'plain' does not shrink at {says}: its ranks are 6",),
        expected="a higher one would only add zeros",
        do="use a lower rank",
    )
    assert tree(tmp_path) == before


def test_other_dtypes_are_refused(adapters, tmp_path):
    with pytest.raises(ExtractionError, match="dtype='int8'"):
        rerank(read_adapter(adapters / "plain", "plain"), tmp_path / "small", Truncation(rank=1), dtype="int8")
