"""The index: what it holds of each expert, and when it is out of date."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from models import close, dense_deltas, peft_adapter
from scaling import TEXTS, ids_of, make_library, routed_model
from spectr import ExpertLibrary, Shortlist, build_index, calibrate, indexing
from spectr.calibration import read_inputs
from spectr.composition.subset_probes import calibration_texts
from spectr.errors import AdapterError, CompositionError, LibraryError
from spectr.library import Index, LibraryStore
from spectr.prompts.probe import Probe
from spectr.spectral import reference
from text_model import make_model, make_tokenizer


def calibrated(root):
    library = ExpertLibrary.open(root)
    calibrate(make_model(), library, make_tokenizer(), texts=TEXTS, null=0).save(root)
    return ExpertLibrary.open(root)


@torch.no_grad()
def test_prototypes_score_as_arrow_over_the_usual(root, library):
    known = library.calibration
    prototypes = library.index.prototypes(library.names, known.means)
    module = "model.layers.0.self_attn.q_proj"
    texts = []
    model = make_model()
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, x: texts.append(x[0].double()))
    model(input_ids=known.input_ids, attention_mask=known.real.long())
    model(input_ids=ids_of("is the grass blue"))
    handle.remove()
    usual, x = texts[0][known.said.counted], texts[1][0]
    mean = texts[0][known.counted].mean(0)
    found = prototypes[module].scores(x.float())
    for place, name in enumerate(prototypes[module].experts):
        delta = dense_deltas(root / name)[module]
        rms = (sum(reference.arrow_score(delta, y - mean) ** 2 for y in usual) / len(usual)) ** 0.5
        exact = torch.tensor([reference.arrow_score(delta, y - mean) / rms for y in x], dtype=torch.float64)
        # 8 bits: the stored error of the prototype, times the length of what it is multiplied with
        entry = library.index[name]
        error = float(entry.error_M[[m.name for m in entry.modules].index(module)])
        bound = error * (x - mean).norm(dim=-1) / rms
        assert ((found[:, place].double() - exact).abs() <= bound + 2e-4 * (1 + exact)).all()
        assert error < 0.05


@torch.no_grad()
def test_sizes_are_over_the_words_that_a_probe_hears(library):
    known, inputs = library.calibration, {}
    _, routed = routed_model(library, Shortlist(size=1))
    opening, null = calibration_texts(known)
    probe = Probe(routed.model, routed.layers, routed.scorers, routed.policy.evidence, routed.experts, opening)
    probe.observe(lambda name, x_NI, *_: inputs.update({name: x_NI - known.means[name]}), **null.batches[0])
    entry = library.index["cats"]
    rows = entry.full_C.split([module.inputs for module in entry.modules])
    for module, v_I, rms in zip(entry.modules, rows, entry.rms_M, strict=True):
        close((inputs[module.name] @ v_I).square().mean().sqrt(), rms, 1e-5)
    assert known.said.counted.sum() == known.counted.sum() - len(TEXTS) * len(known.closing) < known.counted.sum()


def test_an_expert_that_adapts_fewer_modules_is_scored_at_those(library):
    prototypes = library.index.prototypes(library.names, library.calibration.means)
    with_wasp = {module for module, here in prototypes.items() if "wasp" in here.experts}
    assert {module.rpartition(".")[2] for module in with_wasp} == {"q_proj", "down_proj"}
    assert len(with_wasp) < len(prototypes)


def test_it_is_kept_and_read_again(root, library, tmp_path):
    shutil.copytree(root, tmp_path / "lib")
    kept = build_index(make_model(), calibrated(tmp_path / "lib"), tmp_path / "lib")
    again = ExpertLibrary.open(tmp_path / "lib")
    assert all(again.indexed(name) for name in again)
    for name in again:
        ours, theirs = kept.index[name], again.index[name]
        assert ours.modules == theirs.modules
        for part in ("codes_C", "steps_M", "rms_M", "error_M"):
            assert torch.equal(getattr(ours, part), getattr(theirs, part))
        assert ours.rotations().keys() == theirs.rotations().keys()
        for module, rotation in ours.rotations().items():
            assert all(torch.equal(a, b) for a, b in zip(rotation, theirs.rotations()[module], strict=True))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on warns of it, whatever is forked
def test_processes_make_the_same_entries(root, library, tmp_path, monkeypatch):
    monkeypatch.setattr("spectr.indexing._TOGETHER", 2)
    shutil.copytree(root, tmp_path / "lib")
    told, here = [], os.getpid()
    monkeypatch.setattr("spectr.indexing._entries", in_a_process(here, indexing._entries))
    kept = build_index(make_model(), calibrated(tmp_path / "lib"), tmp_path / "lib", progress=lambda *t: told.append(t))
    assert [(done, total) for done, total, _ in told] == [(i + 1, len(library)) for i in range(len(library))]
    for name in library:
        ours, theirs = kept.index[name], library.index[name]
        assert torch.equal(ours.codes_C, theirs.codes_C)
        close(ours.rms_M, theirs.rms_M, 1e-5)
        assert ours.rotations().keys() == theirs.rotations().keys()


def in_a_process(parent, make):
    def entries(*given):
        assert os.getpid() != parent
        return make(*given)

    return entries


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_damaged_expert_is_reported_from_a_process_as_from_here(root, tmp_path, monkeypatch):
    monkeypatch.setattr("spectr.indexing._TOGETHER", 2)
    shutil.copytree(root, tmp_path / "lib")
    library = calibrated(tmp_path / "lib")
    weights = library["bees"].weights

    def then_damage(*given):
        read_inputs(*given)
        weights.write_bytes(weights.read_bytes()[:100])

    monkeypatch.setattr("spectr.indexing.read_inputs", then_damage)
    with pytest.raises(AdapterError, match=r"\Aexpert 'bees': .* cannot be read as safetensors"):
        build_index(make_model(), library, tmp_path / "lib")


def test_an_expert_more_is_a_file_more(root, tmp_path, no_sync):
    folder = tmp_path / "lib"
    for name in ("ants", "bees"):
        LibraryStore(folder).add(name, root / name)
    build_index(make_model(), calibrated(folder), folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "index").iterdir()}
    LibraryStore(folder).add("cats", root / "cats")
    seen = []
    build_index(make_model(), calibrated(folder), folder, progress=lambda *told: seen.append(told))
    assert seen == [(1, 1, "cats")]
    after = {path: path.stat().st_mtime_ns for path in (folder / "index").iterdir()}
    assert before.items() < after.items()
    LibraryStore(folder).remove("bees")
    assert {path.stem for path in (folder / "index").iterdir()} == {"ants", "cats"}


def test_another_expert_of_that_name_is_not_indexed(root, tmp_path, no_sync):
    folder = tmp_path / "lib"
    LibraryStore(folder).add("ants", root / "ants")
    LibraryStore(folder).add("dogs", root / "dogs")
    build_index(make_model(), calibrated(folder), folder)
    LibraryStore(folder).add("ants", root / "eels", replace=True)
    library = ExpertLibrary.open(folder)
    assert not library.indexed("ants")
    assert library.indexed("dogs")


def test_another_calibration_makes_it_old(library):
    known = library.calibration
    other = replace(known, input_ids=known.input_ids + 1)
    assert not any(library.with_calibration(other).indexed(name) for name in library)


def test_an_expert_that_cannot_be_rotated_is_aligned_when_it_is_read(tmp_path):
    make_library(tmp_path)
    adapter = peft_adapter(make_model(), tmp_path / "gnats", 7, rank=4)
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key][1] = tensors[key][0]
    save_file(tensors, adapter / "adapter_model.safetensors")
    library = build_index(make_model(), calibrated(tmp_path))
    entry = library.index["gnats"]
    assert len(entry.rotations()) == len(entry.modules) - 1
    close(entry.rms_M, entry.rms_M.clamp(min=1e-6))


def test_a_damaged_entry_is_reported(root, library, tmp_path):
    shutil.copytree(root, tmp_path / "lib")
    build_index(make_model(), calibrated(tmp_path / "lib"), tmp_path / "lib")
    path = tmp_path / "lib" / "index" / "bees.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LibraryError, match=r"bees.safetensors cannot be read(.|\n)*library index"):
        ExpertLibrary.open(tmp_path / "lib").indexed("bees")


def test_experts_have_to_be_calibrated_first(root):
    with pytest.raises(CompositionError, match="not calibrated"):
        build_index(make_model(), ExpertLibrary.open(root))


def test_an_index_of_nothing_is_empty():
    assert json.dumps(list(Index({}))) == "[]"
