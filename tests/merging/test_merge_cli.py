"""``spectr merge`` as its user meets it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from spectr import ExpertLibrary
from spectr.adapters import read_adapter
from spectr.merging import DareTies, Recipe, Ties, merge_adapter, merge_into
from text_model import make_model, save_experts, save_model

NAMES = ("amber", "blue", "cyan")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny chat model and three experts for it."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "model")
    save_experts(root / "adapters", NAMES)
    return root


def test_an_adapter_and_a_table_of_what_it_keeps(spectr, world, tmp_path):
    out = tmp_path / "runs" / "merged"
    words = ("merge", "amber", "blue", "-l", world / "adapters", "--weights", "1,0.5", "--density", 0.3)
    code, text, notes = spectr(*words, "--rank", 3, "--out", out)
    assert code == 0
    assert "ties of amber, blue: 14 modules" in text
    for phrase in ("energy kept", "smallest", "median", "largest", f"{out}"):
        assert phrase in text
    assert "merging modules: 14 of 14" in notes
    library = ExpertLibrary.open(world / "adapters")
    recipe = Recipe(experts=("amber", "blue"), method=Ties(density=0.3), weights=(1.0, 0.5))
    ours, written = merge_adapter(library, recipe, rank=3), read_adapter(out, "merged")
    assert written.ranks == (3,)
    with written.open() as read:
        for module, delta in ours.deltas.items():
            assert torch.equal(read(module).A, delta.A)


def test_settings_of_a_method_and_a_general_expert_reach_it(spectr, world, tmp_path):
    words = ("merge", "amber,blue", "-l", world / "adapters", "--method", "dare-ties", "--seed", 4, "--scale", 0.5)
    code, _, _ = spectr(*words, "--density", 0.6, "--subtract", "cyan", "--strength", 0.3, "-o", tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "expert.json").read_text())
    assert code == 0
    assert facts["merge"] == {"method": "dare-ties", **vars(DareTies(density=0.6, scale=0.5, seed=4))}
    assert [expert["expert"] for expert in facts["subtracted"]] == ["cyan"]
    assert facts["strength"] == 0.3


def test_an_energy_gives_modules_the_ranks_that_they_need(spectr, world, tmp_path):
    words = ("merge", *NAMES, "-l", world / "adapters", "--method", "average", "--energy", 0.8)
    assert spectr(*words, "-o", tmp_path / "out")[0] == 0
    assert len(read_adapter(tmp_path / "out", "merged").ranks) > 1
    facts = json.loads((tmp_path / "out" / "expert.json").read_text())
    assert min(facts["energy"].values()) >= 0.8 - 1e-6


def test_a_whole_model_with_the_merge_in_it(spectr, world, tmp_path):
    out = tmp_path / "model"
    words = ("merge", "amber", "blue", "-l", world / "adapters", "--method", "knots", "--into-base", "-m")
    code, text, _ = spectr(*words, world / "model", "-o", out)
    assert code == 0
    assert "change of the weights" in text
    assert "energy kept" in text
    model = make_model()
    from spectr.merging import Knots

    recipe = Recipe(experts=("amber", "blue"), method=Knots())
    merge_into(model, ExpertLibrary.open(world / "adapters"), recipe)
    written = load_file(out / "model.safetensors")
    for name, weight in model.state_dict().items():
        if name in written:
            assert torch.equal(written[name], weight)
    answer = spectr("generate", "what", "-m", out, "-l", world / "adapters", "-n", 2, "--dtype", "float32")
    assert answer[0] == 0


MISTAKES = {
    "unknown method": (("--method", "tie"), "unknown method 'tie'", "did you mean 'ties'?"),
    "density": (("--density", "2"), "settings of 'ties' out of range: density=2.0", "at most 1"),
    "a setting of another": (("--seed", "2"), "method 'ties' has no seed", "some of: density, scale"),
    "weights": (("--weights", "1"), "1 weight for 2 experts", "pass 2 numbers, for amber, blue"),
    "no numbers": (("--weights", "1;2"), "--weights 1;2", '"1,0.5"'),
    "linear": (("--method", "linear"), "method 'linear' needs weights", "--weights 1,1"),
    "unknown general": (("--subtract", "cyam"), "unknown expert 'cyam'", "did you mean 'cyan'?"),
    "general twice": (("--subtract", "blue"), "both merged and subtracted: blue", "remove it"),
    "strength of factors": (
        ("--method", "genknowsub", "--subtract", "cyan", "--strength", "2"),
        "'genknowsub' has no strength",
        "omit --strength",
    ),
    "two for one": (("--method", "genknowsub", "--subtract", "cyan"), "merges one expert, not 2", "one expert"),
    "nothing general": (("--method", "genknowsub"), "'genknowsub' needs a general expert", "--subtract GENERAL"),
    "rank of a model": (("--into-base", "--rank", "4"), "have no effect with --into-base", "remove them"),
    "rank": (("--rank", "0"), "rank=0", "at least 1"),
    "energy": (("--energy", "2"), "energy=2.0", "at most 1"),
    "strength": (("--subtract", "cyan", "--strength", "0"), "strength=0.0", "not 0"),
    "no library": (("-l", "nowhere"), "there is no library folder nowhere", "spectr library add"),
    "folder in use": (("-o", "{full}"), "{full} is not empty", "choose another --out"),
    "no model": (("--into-base", "-m", "/no/model"), "the model '/no/model' could not be loaded", "check --model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_before_anything_is_written(spectr, world, tmp_path, monkeypatch, mistake):
    words, given, hint = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    base = ("merge", "amber", "blue", "-l", world / "adapters", "-o", tmp_path / "out")
    code, text, notes = spectr(*base, *(word.format(full=full) for word in words))
    assert (code, text) == (2, "")
    assert given.format(full=full) in notes
    assert hint in notes
    assert "Traceback" not in notes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_all_mistakes_are_reported_at_once(spectr, world, tmp_path):
    words = ("merge", "ambr", "dog", "-l", world / "adapters", "--method", "tie", "--weights", "1", "--rank", 0)
    code, _, notes = spectr(*words, "-o", world / "adapters")
    assert code == 2
    assert "nothing was merged: 6 problems" in notes
    for phrase in ("is not empty", "rank=0", "unknown method", "1 weight for 2", "unknown expert 'ambr'", "'dog'"):
        assert phrase in notes


def test_options_that_make_no_difference_are_reported(spectr, world, tmp_path):
    words = ("merge", "amber", "blue", "-l", world / "adapters", "--out", tmp_path / "out")
    code, _, notes = spectr(*words, "--model", "m", "--dtype", "bfloat16", "--strength", 0.5)
    assert code == 2
    for option, of in (("--model", "--into-base"), ("--dtype", "--into-base"), ("--strength", "--subtract")):
        assert f"{option} has no effect without {of}" in " ".join(notes.split())
    assert not (tmp_path / "out").exists()


def test_others_can_read_an_adapter(spectr, world, tmp_path):
    code, _, notes = spectr("merge", "amber", "blue", "-l", world / "adapters", "--out", tmp_path / "out")
    assert code == 0
    assert "spectr library add out" in " ".join(notes.split())
    modes = {path.stat().st_mode & 0o044 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o044}
