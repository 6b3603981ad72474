"""Calibrating: the statistics, how they are kept, and what is refused."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
import torch
from calibrating import DOWN, RANKS, TEXTS, Q, ids_of, inputs_of_texts, routed_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models import close, dense_deltas, logits, peft_adapter
from spectr import Calibrated, ExpertLibrary, calibrate, compose
from spectr.errors import CompositionError, DataError, LibraryError
from spectr.library import Calibration
from spectr.models import encode_prompt
from text_model import make_model, make_tokenizer

# The statistics


def test_means_and_root_mean_squares_are_those_of_the_dense_updates(root, library):
    rows = inputs_of_texts(library, [Q, DOWN])
    for module in (Q, DOWN):
        mean = torch.stack(rows[module]).mean(0)
        for name in RANKS:
            delta = dense_deltas(root / name)[module]
            slow = (sum(float((delta @ (x - mean)).norm()) ** 2 for x in rows[module]) / len(rows[module])) ** 0.5
            found = library.calibration.of(name, module)
            close(found.mean_I.double(), mean)
            assert found.rms == pytest.approx(slow, rel=1e-4)


@torch.no_grad()
def test_a_module_that_makes_logits_is_measured_at_every_counted_token(tmp_path):
    peft_adapter(make_model(), tmp_path / "dogs", seed=9, targets=["lm_head", "q_proj"])
    known = calibrate(make_model(), ExpertLibrary.open(tmp_path), make_tokenizer(), texts=TEXTS, null=0)
    seen = {}
    model = make_model()
    model.lm_head.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    model(input_ids=known.input_ids, attention_mask=known.real.long())
    x_TI = seen["x"][known.counted].double()
    found = known.of("dogs", "lm_head")
    close(found.mean_I.double(), x_TI.mean(0))
    answers_TO = (x_TI - x_TI.mean(0)) @ dense_deltas(tmp_path / "dogs")["lm_head"].mT
    assert found.rms == pytest.approx(float(answers_TO.square().sum(1).mean().sqrt()), rel=1e-4)


def test_self_samples_depend_on_the_seed_alone_and_count_what_the_model_wrote(root):
    plain = ExpertLibrary.open(root)
    one, same, other = (
        calibrate(make_model(), plain, make_tokenizer(), seed=seed, samples=3, null=2) for seed in (1, 1, 2)
    )
    assert torch.equal(one.input_ids, same.input_ids)
    assert one.null == same.null != other.null
    assert one.rms == same.rms
    assert one.input_ids.tolist() != other.input_ids.tolist()
    tokenizer, size = make_tokenizer(), len(one.opening)
    assert not one.counted[:, :size].any()
    assert torch.equal(one.counted[:, size:], one.real[:, size:])
    for ids, real in zip(one.input_ids, one.real, strict=True):  # each is a whole user turn
        text = tokenizer.decode(ids[real][size : -len(one.closing)])
        assert encode_prompt(tokenizer, text) == ids[real].tolist()
    assert one.settings["source"] == "self-samples"
    assert one.settings["tokens"] == int(one.counted.sum())


def test_calibrating_leaves_the_model_and_the_random_state_alone(root):
    model, ids = make_model(), ids_of("what is it")
    before, state = logits(model, ids), torch.random.get_rng_state()
    calibrate(model, ExpertLibrary.open(root), make_tokenizer(), samples=2, null=2)
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_calibration_is_made_without_dropout(root):
    model, other = make_model(), make_model()
    other.config.attention_dropout = 0.5
    for layer in other.model.layers:
        layer.self_attn.attention_dropout = 0.5
    other.train()
    other.model.layers[0].eval()
    modes = [module.training for module in other.modules()]
    library = ExpertLibrary.open(root)
    want, found = (calibrate(each, library, make_tokenizer(), texts=["what is it"], null=2) for each in (model, other))
    assert all(torch.equal(found.means[name], mean) for name, mean in want.means.items())
    assert found.null == want.null
    assert [module.training for module in other.modules()] == modes


def test_an_expert_that_is_added_is_measured_alone_on_the_same_texts(root, library, tmp_path):
    peft_adapter(make_model(), tmp_path / "dogs", seed=9, rank=4)
    larger = library.with_expert("dogs", tmp_path / "dogs")
    grown = calibrate(make_model(), larger, make_tokenizer(), null=0)
    assert torch.equal(grown.input_ids, library.calibration.input_ids)
    for name in RANKS:
        assert grown.rms[name] is library.calibration.rms[name]
    whole = calibrate(make_model(), larger, make_tokenizer(), texts=TEXTS, null=0)
    assert grown.rms["dogs"] == pytest.approx(whole.rms["dogs"])


def test_more_ordinary_prompts_are_written_where_a_calibration_has_fewer(library):
    few = calibrate(make_model(), library, make_tokenizer(), null=3)
    more = calibrate(make_model(), library.with_calibration(few), make_tokenizer(), null=5)
    assert (len(few.null), len(more.null)) == (3, 5)
    assert more.rms == few.rms
    kept = calibrate(make_model(), library.with_calibration(more), make_tokenizer(), null=4)
    assert kept.null == more.null


@torch.no_grad()
@pytest.mark.parametrize(("scale", "fewer"), [(1.0, 4), (-4.0, -1)])
def test_the_null_is_read_by_other_base_models_alone(library, scale, fewer):
    known = calibrate(make_model(), library, make_tokenizer(), null=5)
    found, read = [], []
    for given in (known, replace(known, null_experts=(), null_numbers=None)):
        model, seen = make_model(), []
        model.model.layers[0].mlp.down_proj.weight.mul_(scale)
        routed = compose(model, library.with_calibration(given), Calibrated(abstain=None))
        model.model.embed_tokens.register_forward_pre_hook(lambda _, args, seen=seen: seen.extend(args[0]))
        found.append(routed.prompt.find(input_ids=ids_of("what is it")))
        read.append(len(seen))
    assert read[1] - read[0] == fewer  # of five texts the shortest alone is read, and all where it differs
    close(found[0].evidence_BE, found[1].evidence_BE)
    assert torch.equal(found[0].p_B, found[1].p_B)


def test_numbers_of_the_null_are_computed_anew_for_other_experts(root, library, tmp_path):
    known = calibrate(make_model(), library, make_tokenizer(), null=3)
    assert known.null_experts == library.names
    assert known.null_numbers.shape[1:] == (3, len(library))
    peft_adapter(make_model(), tmp_path / "dogs", seed=9, rank=4)
    larger = library.with_calibration(known).with_expert("dogs", tmp_path / "dogs")
    grown = calibrate(make_model(), larger, make_tokenizer(), null=3)
    assert grown.null_experts == larger.names
    same = calibrate(make_model(), larger.with_calibration(grown), make_tokenizer(), null=3)
    assert same.null_numbers is grown.null_numbers


def test_a_calibration_is_saved_and_loaded_as_it_is(library, tmp_path):
    known = calibrate(make_model(), library, make_tokenizer(), null=3)
    known.save(tmp_path)
    loaded = Calibration.load(tmp_path)
    assert {name: dict(values) for name, values in loaded.rms.items()} == {
        name: pytest.approx(values) for name, values in known.rms.items()
    }
    assert all(torch.equal(loaded.means[module], known.means[module]) for module in known.means)
    assert torch.equal(loaded.input_ids, known.input_ids)
    assert torch.equal(loaded.null_numbers, known.null_numbers)
    assert loaded.null_experts == known.null_experts == library.names
    assert (loaded.sha256, loaded.settings) == (known.sha256, known.settings)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.safetensors"]


def test_numbers_of_an_older_evidence_are_computed_anew(library, tmp_path):
    known = calibrate(make_model(), library, make_tokenizer(), null=3)
    path = known.save(tmp_path)
    tensors = load_file(path)
    tensors["null_numbers"] = tensors.pop("null_numbers_by_weight")
    with safe_open(path, "pt") as file:
        save_file(tensors, path, metadata=file.metadata())
    older = Calibration.load(tmp_path)
    assert (older.null_numbers, older.null_experts) == (None, ())
    again = calibrate(make_model(), library.with_calibration(older), make_tokenizer(), null=3)
    assert (again.null, again.null_experts) == (known.null, library.names)
    close(again.null_numbers, known.null_numbers)


def test_a_library_without_calibration_has_none(tmp_path):
    assert Calibration.load(tmp_path) is None


@pytest.mark.parametrize("damage", ["cut short", "another version"])
def test_a_damaged_calibration_says_what_to_do(library, tmp_path, damage):
    path = library.calibration.save(tmp_path)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        save_file({"x": torch.zeros(1)}, path, metadata={"format": "0"})
    with pytest.raises(LibraryError, match=r"calibrate again: spectr library calibrate --library .* --fresh"):
        Calibration.load(tmp_path)


def test_an_expert_that_is_not_calibrated_is_named_and_nothing_is_changed(root, library, tmp_path):
    peft_adapter(make_model(), tmp_path / "dogs", seed=9, rank=4)
    larger = library.with_expert("dogs", tmp_path / "dogs")
    model = make_model()
    with pytest.raises(CompositionError, match=re.escape("not calibrated: dogs")) as caught:
        compose(model, larger, Calibrated())
    assert "spectr library calibrate --library" in str(caught.value)
    assert not model._forward_pre_hooks
    with pytest.raises(CompositionError, match="not calibrated: ants, bees, cats"):
        compose(model, ExpertLibrary.open(root), Calibrated())


def test_other_weights_under_the_same_name_are_not_calibrated(root, library, tmp_path):
    peft_adapter(make_model(), tmp_path / "bees", seed=77, rank=2)
    sources = {name: root / name for name in RANKS} | {"bees": tmp_path / "bees"}
    changed = ExpertLibrary.from_adapters(sources).with_calibration(library.calibration)
    with pytest.raises(CompositionError, match="not calibrated: bees"):
        compose(make_model(), changed, Calibrated())


def test_weights_that_change_in_place_are_noticed(root, library, tmp_path):
    """Hashes are remembered, but not beyond a change of the file."""
    shutil.copytree(root, tmp_path / "copy")
    own = ExpertLibrary.open(tmp_path / "copy").with_calibration(library.calibration)
    assert own.calibration.covers(own["bees"])
    tensors = load_file(own["bees"].weights)
    save_file({key: tensor * 1.5 for key, tensor in tensors.items()}, own["bees"].weights)
    assert not own.calibration.covers(own["bees"])


def test_what_cannot_be_calibrated_is_refused(root, library):
    with pytest.raises(CompositionError, match="call remove"):
        calibrate(routed_model(library)[0], library, make_tokenizer())
    with pytest.raises(DataError, match="texts is empty"):
        calibrate(make_model(), library, make_tokenizer(), texts=[" "])


@pytest.mark.parametrize("empty", ["no tokens", "all masked", "no prompts"])
def test_prompts_without_a_token_are_refused(library, empty):
    model, ids = make_model(), torch.tensor([[4, 5, 6]])
    given = {
        "no tokens": {"input_ids": ids[:, :0]},
        "all masked": {"input_ids": ids, "attention_mask": torch.zeros_like(ids)},
        "no prompts": {"input_ids": ids[:0]},
    }[empty]
    compose(model, library, Calibrated(abstain=None))
    for call in (model, model.generate):
        with pytest.raises(CompositionError, match="no token that the attention mask leaves"):
            call(**given)
