"""Experts from checkpoints whose difference is known."""

import json

import pytest
import torch
from checkpoints import linear_change, load, low_rank, rewrite, same_logits, save_pair, take, tiny_gpt2, updates

from models import tiny_llama
from spectr.adapters import read_adapter
from spectr.extraction import Extraction, extract


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A Llama with a change of rank 3 in each linear layer: folders, changes, the tuned model."""
    model = tiny_llama()
    return *save_pair(tmp_path_factory.mktemp("known"), model, linear_change(3)), model


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The same with changes of full rank."""
    model = tiny_llama()
    return *save_pair(tmp_path_factory.mktemp("full"), model, linear_change(None)), model


@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_a_change_of_known_rank_comes_back_whole(known, tmp_path, method):
    base, tuned, changes, model = known
    report = take(base, tuned, tmp_path / "expert", rank=3, method=method)
    found = updates(tmp_path / "expert")
    assert {f"{module}.weight" for module in found} == set(changes)
    for module, update in found.items():
        change = changes[f"{module}.weight"].double()
        torch.testing.assert_close(update, change, rtol=0, atol=1e-5 * float(change.abs().max()))
    assert all(kept.share == pytest.approx(1, abs=1e-6) for kept in report.modules)
    assert {kept.method for kept in report.modules} == {method}
    same_logits(base, model, tmp_path / "expert")


def test_bfloat16_is_the_default_and_is_near(known, tmp_path):
    base, tuned, changes, _ = known
    extract(tuned, base, tmp_path / "expert", Extraction(rank=3))
    for module, update in updates(tmp_path / "expert").items():
        change = changes[f"{module}.weight"].double()
        assert (update - change).norm() < 2**-7 * change.norm()
    with read_adapter(tmp_path / "expert", "e").open() as read:
        assert read(module).A.dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [1, 5])
def test_the_error_is_the_tail_of_the_singular_values(full, tmp_path, rank):
    base, tuned, changes, _ = full
    report = take(base, tuned, tmp_path / "expert", rank=rank)
    found = updates(tmp_path / "expert")
    for kept in report.modules:
        change = changes[f"{kept.module}.weight"].double()
        S = torch.linalg.svdvals(change)
        error = (found[kept.module] - change).square().sum()
        torch.testing.assert_close(error, S[rank:].square().sum(), rtol=1e-4, atol=0)
        assert kept.share == pytest.approx(float(S[:rank].square().sum() / S.square().sum()), abs=1e-5)
        assert kept.change == pytest.approx(float(change.norm()), rel=1e-5)


def test_the_share_reported_by_the_randomised_method_is_the_true_one(full, tmp_path):
    base, tuned, changes, _ = full
    report = take(base, tuned, tmp_path / "expert", rank=4, method="randomised")
    best = take(base, tuned, tmp_path / "best", rank=4, method="exact")
    found = updates(tmp_path / "expert")
    for kept, optimum in zip(report.modules, best.modules, strict=True):
        change = changes[f"{kept.module}.weight"].double()
        left = float((found[kept.module] - change).square().sum() / change.square().sum())
        assert kept.share == pytest.approx(1 - left, abs=1e-5)
        assert optimum.share * 0.98 < kept.share <= optimum.share + 1e-6


def test_the_randomised_method_depends_on_its_seed_alone(full, tmp_path):
    base, tuned, _, _ = full
    options = {"rank": 4, "method": "randomised", "oversampling": 0, "power_iterations": 0}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(name))
        take(base, tuned, tmp_path / name, seed=seed, **options)
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("method", ["exact", "randomised"])
def test_energy_takes_the_fewest_ranks_that_hold_the_share(full, tmp_path, method):
    base, tuned, changes, _ = full
    report = take(base, tuned, tmp_path / "expert", energy=0.8, method=method)
    for kept in report.modules:
        S = torch.linalg.svdvals(changes[f"{kept.module}.weight"].double()).square()
        shares = S.cumsum(0) / S.sum()
        assert kept.rank == int((shares < 0.8).sum()) + 1
        assert kept.share >= 0.8
    assert len({kept.rank for kept in report.modules}) > 1
    assert report.remarks == ()


def test_a_cap_on_ranks_is_reported(full, tmp_path):
    base, tuned, _, _ = full
    report = take(base, tuned, tmp_path / "expert", energy=0.99, max_rank=2)
    assert {kept.rank for kept in report.modules} == {2}
    assert "14 of 14 modules stay below the share of 0.99: they would need more than 2 ranks" in report.remarks[0]


def test_unequal_ranks_are_read_alike_by_peft_and_by_spectr(full, tmp_path):
    base, tuned, _, model = full
    report = take(base, tuned, tmp_path / "expert", energy=1.0)
    shapes = read_adapter(tmp_path / "expert", "e").shapes
    assert {module: shape.rank for module, shape in shapes.items()} == {k.module: k.rank for k in report.modules}
    assert {shape.scale for shape in shapes.values()} == {1.0}
    assert len({shape.rank for shape in shapes.values()}) > 1
    same_logits(base, model, tmp_path / "expert")


def test_many_files_give_what_one_gives(full, tmp_path):
    base, tuned, _, model = full
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    for name, source in (("one", tuned), ("many", tmp_path / "sharded")):
        take(base, source, tmp_path / name, rank=4)
    one, many = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "many"))
    assert one == many
    origin = json.loads((tmp_path / "many" / "expert.json").read_text())["origin"]
    assert sum(key.startswith("fine-tuned model-0") for key in origin["source"]) > 2


def test_transposed_layers_and_a_checkpoint_without_its_prefix(tmp_path):
    model = tiny_gpt2()
    base, tuned, changes = save_pair(tmp_path, model, linear_change(3))
    rewrite(base, lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    report = take(base, tuned, tmp_path / "expert", rank=3)
    assert report.left == ()
    found = updates(tmp_path / "expert")
    assert {f"{module}.weight" for module in found} == set(changes)
    for module, update in found.items():
        change = changes[f"{module}.weight"].double().T
        torch.testing.assert_close(update, change, rtol=0, atol=1e-5 * float(change.abs().max()))
    assert json.loads((tmp_path / "expert" / "adapter_config.json").read_text())["fan_in_fan_out"]
    same_logits(base, model, tmp_path / "expert")


def test_a_head_of_its_own_is_a_linear_layer(tmp_path):
    model = tiny_llama()
    base, tuned, changes = save_pair(tmp_path, model, linear_change(3, skip="layers"))
    assert list(changes) == ["lm_head.weight"]
    report = take(base, tuned, tmp_path / "expert", rank=3)
    assert [kept.module for kept in report.modules] == ["lm_head"]
    same_logits(base, model, tmp_path / "expert")


def test_a_tied_head_is_left_out_once_and_by_its_embedding(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    embedding = {"model.embed_tokens.weight": 0.1}

    def change(name, weight):
        rest = linear_change(2)(name, weight)
        return torch.full_like(weight, embedding[name]) if name in embedding else rest

    base, tuned, changes = save_pair(tmp_path, model, change)
    report = take(base, tuned, tmp_path / "expert", rank=2)
    [left] = report.left
    assert (left.name, left.kind) == ("model.embed_tokens.weight", "embedding, tied to lm_head.weight")
    weight = load(base).model.embed_tokens.weight
    change = changes["model.embed_tokens.weight"]
    assert left.relative == pytest.approx(float(change.norm() / weight.norm()), rel=1e-5)
    rest = sum(float(d.square().sum()) for d in changes.values())
    assert report.left_share == pytest.approx(float(change.square().sum()) / rest, rel=1e-5)


def test_what_lora_cannot_carry_is_reported_by_name_and_kind(tmp_path):
    model = tiny_llama(attention_bias=True)
    odd = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.bias")

    def change(name, weight):
        return torch.full_like(weight, 0.5) if name in odd else linear_change(2)(name, weight)

    base, tuned, _ = save_pair(tmp_path, model, change)
    rewrite(tuned, lambda tensors: {**tensors, "score.weight": torch.ones(1, 32)})
    report = take(base, tuned, tmp_path / "expert", rank=2)
    kinds = {left.name: left.kind for left in report.left}
    assert kinds == {
        **dict(zip(odd, ("embedding", "norm", "bias"), strict=True)),
        "score.weight": "tensor that the base lacks",
    }
    biases = {left.name: left.relative for left in report.left}
    assert biases["model.layers.1.self_attn.q_proj.bias"] is None  # zero in the base
    assert biases["model.norm.weight"] == pytest.approx(0.5)
    card = (tmp_path / "expert" / "README.md").read_text()
    assert "4 parameters changed that LoRA cannot hold" in card
    assert "| model.norm.weight | norm | 5.00e-01 |" in card


def test_an_unchanged_module_is_no_target(tmp_path):
    model = tiny_llama()
    base, tuned, changes = save_pair(tmp_path, model, linear_change(2, skip="layers.0.self_attn.q_proj"))
    changes.pop("lm_head.weight")
    take(base, tuned, tmp_path / "expert", rank=2)
    config = json.loads((tmp_path / "expert" / "adapter_config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" not in config["target_modules"]
    assert "model.layers.1.self_attn.q_proj" in config["target_modules"]
    same_logits(base, model, tmp_path / "expert")


def test_other_precisions_are_compared_in_float32_and_coarser_ones_are_reported(known, tmp_path):
    base, tuned, changes, _ = known
    half = tmp_path / "half"
    load(tuned).bfloat16().save_pretrained(half)
    report = take(base, half, tmp_path / "expert", rank=3)
    assert "stored as BF16, the base as F32" in report.remarks[0]
    for module, update in updates(tmp_path / "expert").items():
        change = changes[f"{module}.weight"].double()
        assert (update - change).norm() < 0.2 * change.norm()


def test_origin_and_card(known, tmp_path):
    base, tuned, _, _ = known
    extract(tuned, base, tmp_path / "expert", Extraction(rank=2, seed=7), name="mine", base_model="org/base")
    data = json.loads((tmp_path / "expert" / "expert.json").read_text())
    assert (data["name"], data["base_model"]) == ("mine", "org/base")
    assert data["origin"]["settings"]["seed"] == 7
    assert len(data["origin"]["source"]["base model.safetensors sha256"]) == 64
    assert len(data["modules"]) == 14
    card = (tmp_path / "expert" / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/base\nlibrary_name: peft")
    assert "| q_proj | 2 |" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert"]


def test_low_rank_is_what_it_says():
    assert int(torch.linalg.matrix_rank(low_rank(3, outputs=9, inputs=7, seed=0))) == 3
