"""A composed model as a folder: the same model again, whole or not at all, and never its base model unnoticed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spectr
from adapters_on_disk import assert_says, tree
from spectr.composed_model import Settings, save_composed
from spectr.errors import CompositionError, ModelError
from spectr.folders import new_folder
from spectr.ops.dispatch import report_once
from spectr.routers import get_router, router_names
from spectr.routers.router_config import router_config

EXPERTS = ("amber", "blue", "cyan")


def base(world):
    return spectr.models.load_model(str(world / "model"), dtype="float32", device="cpu")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 17)[None]).logits


@pytest.fixture
def saved(world, tmp_path):
    model, tokenizer = base(world)
    routed = spectr.compose(model, world / "adapters", spectr.Spectr(top_k=2, score="projection"))
    return routed, save_composed(routed, tokenizer, tmp_path / "folder")


def test_a_folder_gives_the_same_composed_model_again(saved):
    routed, folder = saved
    again, tokenizer = spectr.load_composed(folder, dtype="float32")
    assert again.router == routed.router
    assert again.experts == EXPERTS
    assert set(again.layers) == set(routed.layers)
    assert torch.equal(logits(again.model), logits(routed.model))
    assert tokenizer.chat_template
    plain = logits(again.remove())
    assert not torch.equal(plain, logits(routed.model))


def test_a_composed_folder_is_the_base_that_its_experts_name(world, tmp_path, caplog):
    model, tokenizer = base(world)
    model.config._name_or_path = "org/base"
    shutil.copytree(world / "adapters", tmp_path / "adapters")
    for path in (tmp_path / "adapters").glob("*/adapter_config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "org/base"}))
    folder = save_composed(spectr.compose(model, tmp_path / "adapters"), tokenizer, tmp_path / "folder")
    report_once.cache_clear()
    routed, _ = spectr.load_composed(folder, dtype="float32")
    assert {routed.library[name].base_model for name in EXPERTS} == {"org/base"}
    assert "org/base" not in caplog.text


def test_the_experts_are_an_ordinary_library_and_only_those_allowed(world, tmp_path):
    model, tokenizer = base(world)
    routed = spectr.compose(model, world / "adapters", spectr.Spectr(top_k=1)).allow(["amber", "cyan"])
    save_composed(routed, tokenizer, tmp_path / "folder")
    library = spectr.ExpertLibrary.open(tmp_path / "folder" / "experts")
    assert library.names == ("amber", "cyan")
    assert all(library.sha256(name) == routed.library.sha256(name) for name in library)


def test_the_command_writes_what_it_says(spectr, given, tmp_path):
    code, out, err = spectr("compose", "--save", tmp_path / "made", "--access", "closed", "-k", "2", *given)
    assert code == 0, err
    assert "3 experts, 14 routed layers" in out
    assert "copying experts: 3 of 3" in err
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "spectr"
    assert config["access"] == "closed"
    assert config["router"] == {"name": "spectr", "top_k": 2}


@pytest.mark.parametrize(
    ("place", "words", "told"),
    [
        ("used", (), "used is not empty\n  expected: an empty folder or a new one"),
        ("used/file", (), "used/file is a file\n  expected: a folder"),
        ("used/file/below", (), "cannot be created in "),
        ("/proc/nowhere/made", (), "cannot be created in /proc: "),
        ("made", ("--access", "ajar"), "expected: 'open' or 'closed'"),
    ],
)
def test_what_cannot_be_saved_is_reported_before_a_model_is_loaded(
    spectr, given, tmp_path, monkeypatch, place, words, told
):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("spectr.cli.options.open_model", load)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = spectr("compose", "--save", tmp_path / place, *given, *words)
    assert code == 2
    assert told in err
    assert words or err.startswith("error: ")  # no word on the router before it
    assert sorted(tmp_path.rglob("*")) == before


def test_transformers_alone_says_that_it_skips_what_it_does_not_know(saved):
    """It cannot be made to refuse: it warns, and gives the plain model. ``import spectr.composed_model`` helps."""
    _, folder = saved
    program = (
        "import sys; from transformers import AutoModelForCausalLM as A; "
        "load = lambda: type(A.from_pretrained(sys.argv[1]).get_submodule('model.layers.0.mlp.up_proj')).__name__; "
        "print(load()); import spectr.composed_model; print(load())"
    )
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    words = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["Linear", "RoutedLinear"]
    assert "Unknown quantization type, got spectr" in done.stderr


def test_a_composed_folder_is_no_base_model_and_a_base_model_no_composed_folder(saved, world):
    _, folder = saved
    with pytest.raises(ModelError) as error:
        spectr.models.load_model(str(folder))
    assert_says(error.value, given=("is a composed model",), expected="a base model", do="spectr.load_composed")
    with pytest.raises(ModelError) as error:
        spectr.load_composed(world / "model")
    assert_says(error.value, given=("is not a composed folder",), expected="quant_method", do="spectr compose --save")


def test_what_fails_leaves_the_old_folder_and_no_scratch(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("kept")
    before = tree(tmp_path)

    def fail(overwrite):
        with new_folder(out, CompositionError, "use --overwrite", overwrite=overwrite) as folder:
            (folder / "new").write_text("lost")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(overwrite=True)
    assert tree(tmp_path) == before
    with pytest.raises(CompositionError) as error:
        fail(overwrite=False)
    assert_says(error.value, given=("is not empty",), expected="an empty folder", do="--overwrite")
    with new_folder(out, CompositionError, overwrite=True) as folder:
        (folder / "new").write_text("there")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["new"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CompositionError) as error, new_folder(tmp_path / "file", CompositionError, overwrite=True):
        pass
    assert_says(error.value, given=("is a file",), expected="a folder", do="another")


def test_a_router_that_needs_a_guide_is_not_saved(saved, tmp_path):
    routed, _ = saved
    routed.router = spectr.Glider()
    with pytest.raises(CompositionError) as error:
        save_composed(routed, None, tmp_path / "more")
    assert_says(
        error.value, given=("more than a composed folder can hold",), expected="without a guide", do="another router"
    )
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("name", sorted(set(router_names()) - {"oracle", "policy"}))
def test_routers_survive_being_written_down(name):
    router = get_router(name)
    config = json.loads(json.dumps(router_config(router)))
    assert get_router(config.pop("name"), **config) == router


def test_settings_of_a_router_are_written_where_they_differ():
    assert router_config(spectr.Calibrated(level="token", top_k=4)) == {"name": "calibrated-token"}
    assert router_config(spectr.Spectr(top_k=3)) == {"name": "spectr", "top_k": 3}
    assert router_config(spectr.Oracle(expert="amber")) == {"name": "oracle", "expert": "amber"}
    inside = {"name": "shortlist", "size": 4, "modules": ["q_proj"], "token_router": {"name": "spectr", "top_k": 2}}
    assert router_config(spectr.Shortlist(size=4, modules=("q_proj",), token_router=spectr.Spectr(top_k=2))) == inside


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        ({"libary": "x"}, "unknown key 'libary'", None),
        ({"library": 3}, "library=3", "path of a folder"),
        ({"library": "x", "version": 9}, "version 9", "version 1"),
        ({"library": "x", "access": "all"}, "access='all'", "'open' or 'closed'"),
        ({"library": "x", "record": "yes"}, "record='yes'", "true or false"),
        ({"library": "x", "router": "spectr"}, "router='spectr'", '"name"'),
        ({"library": "x", "other_routers": [{"top_k": 1}]}, "other_routers={'top_k': 1}", '"name"'),
        ({"library": "x", "other_routers": "arrow"}, "other_routers='arrow'", '[{"name"'),
        ({"library": "x", "other_routers": [{"name": "spectr"}]}, "routers spectr, spectr", "different names"),
        ({"library": "x", "router": {"name": "spektr"}}, "unknown router 'spektr'", None),
    ],
)
def test_a_wrong_config_is_reported(config, given, expected):
    with pytest.raises(CompositionError) as error:
        Settings.of({"quant_method": "spectr", **config})
    assert given in error.value.given
    assert expected is None or expected in str(error.value.expected)


def test_settings_and_config_are_one():
    settings = Settings(library="experts", router={"name": "arrow", "top_k": 2}, access="closed", record=True)
    assert Settings.of(settings.as_config()) == settings
    assert settings.make_router() == spectr.Arrow(top_k=2)
    others = [{"name": "calibrated"}]
    new = Settings(library="experts", other_routers=others)
    assert Settings.of({"quant_method": "spectr", "library": "experts", "beside": others}) == new


def test_a_relative_library_lies_in_the_models_folder(saved):
    _, folder = saved
    assert Settings(library="experts").as_config()["library"] == "experts"
    library = Settings(library="experts", router={"name": "uniform"}).open_library(folder)
    assert Path(library.origin) == folder / "experts"


def test_commands_take_a_folder_with_its_own_experts_and_router(saved, spectr):
    _, folder = saved
    code, out, err = spectr("generate", "-m", folder, "--dtype", "float32", "-n", 4, "--json", "what is red")
    assert code == 0, err
    told = json.loads(out)
    assert set(told["experts"]) == set(EXPERTS)
    assert told["router"] == str(get_router("spectr-projection", top_k=2))
    code, out, _ = spectr("generate", "-m", folder, "--dtype", "float32", "-k", 1, "-n", 4, "--json", "what is red")
    assert json.loads(out)["router"] == str(get_router("spectr-projection", top_k=1))


def test_settings_can_leave_experts_of_a_library_out(world):
    router = {"name": "spectr", "top_k": 2}
    settings = Settings(library=str(world / "adapters"), router=router, experts=["amber", "cyan"])
    again = Settings.of(settings.as_config())
    assert again.open_library("").names == ("amber", "cyan")
    with pytest.raises(CompositionError, match="list of names"):
        Settings.of({"quant_method": "spectr", "library": "x", "experts": "amber"})
