"""Everything that cannot be extracted, and what is said about it; nothing is ever written then."""

import json

import pytest
import torch
from checkpoints import linear_change, rewrite, save_pair, take
from safetensors.torch import load_file

from adapters_on_disk import assert_says
from models import tiny_llama
from spectr.errors import ExtractionError, ModelError
from spectr.extraction import Extraction, Truncation, extract
from spectr.extraction.checkpoint import locate_model
from spectr.extraction.extraction_settings import shown_bytes


@pytest.fixture
def pair(tmp_path):
    """Base and tuned folders, on which tests lay hands."""
    return save_pair(tmp_path / "models", tiny_llama(), linear_change(2))[:2]


@pytest.fixture
def refused(pair, tmp_path):
    """The error of an extraction; checks that it wrote nothing."""

    def run(kind=ExtractionError, base=None, tuned=None, **settings):
        with pytest.raises(kind) as caught:
            take(base or pair[0], tuned or pair[1], tmp_path / "out" / "expert", **{"rank": 2, **settings})
        assert not (tmp_path / "out").exists()
        return caught.value

    return run


def test_the_same_model_twice(refused, pair):
    error = refused(tuned=pair[0])
    assert_says(error, given=("the same", "21 tensors"), expected="fine-tuned from the base", do="check the two paths")


def test_a_model_that_was_only_rounded_is_the_same(refused, pair):
    rewrite(
        pair[1], lambda _: {name: tensor.half() for name, tensor in load_file(pair[0] / "model.safetensors").items()}
    )
    assert "the same" in refused().given


def test_other_sizes_and_missing_tensors_are_reported_together(refused, pair):
    def edit(tensors):
        tensors.pop("model.norm.weight")
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(40, 32)
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(32, 48, dtype=torch.int8)
        return tensors

    rewrite(pair[1], edit)
    text = str(refused())
    assert "the two checkpoints do not fit together: 3 problems" in text
    assert "the fine-tuned checkpoint lacks model.norm.weight" in text
    assert "sizes differ: model.layers.0.mlp.up_proj.weight is 40 x 32 (base: 48 x 32)" in text
    assert "pass the base that it was fine-tuned from" in text
    assert "not plain floating-point tensors: model.layers.0.mlp.down_proj.weight is I8 (base: F32)" in text
    assert "dequantise the model" in text


def test_a_tensor_that_the_base_lacks_of_its_own_architecture(refused, pair):
    rewrite(pair[0], lambda tensors: {k: v for k, v in tensors.items() if "layers.1" not in k})
    error = refused()
    assert_says(error, given=("the base checkpoint lacks", "and 4 more"), expected="every parameter", do="is complete")


def test_a_resized_vocabulary(refused, pair):
    def edit(tensors):
        return {k: torch.cat([v, v[:3]]) if k.startswith(("lm_head", "model.embed")) else v for k, v in tensors.items()}

    rewrite(pair[1], edit)
    error = refused()
    assert_says(error, given=("64 x 32 (base: 61 x 32)",), expected="the same vocabulary", do="resize the fine-tuned")


def test_weights_that_are_not_those_of_the_configuration(refused, pair):
    for folder in pair:
        rewrite(folder, lambda t: {**t, "model.layers.0.mlp.up_proj.weight": torch.ones(40, 32)})
    error = refused()
    assert_says(error, given=("40 x 32 (there: 48 x 32)",), expected="the same model", do="download or save the base")


@pytest.mark.parametrize(("which", "what"), [(0, "base"), (1, "fine-tuned model")])
def test_nan_is_named_with_its_side(refused, pair, which, what):
    rewrite(pair[which], lambda t: {**t, "model.norm.weight": torch.full((32,), torch.nan)})
    error = refused()
    assert_says(
        error, given=(f"model.norm.weight ({what})",), expected="finite weights", do="download or train it again"
    )


def test_only_what_lora_cannot_carry_has_changed(refused, pair):
    rewrite(
        pair[1], lambda _: {**load_file(pair[0] / "model.safetensors"), "model.norm.weight": torch.full((32,), 2.0)}
    )
    error = refused()
    assert_says(
        error, given=("model.norm.weight (norm, 1.0e+00)",), expected="in a linear layer", do="cannot hold this"
    )


def test_strict_refuses_what_else_has_changed(refused, pair, tmp_path):
    rewrite(pair[1], lambda t: {**t, "model.norm.weight": torch.full((32,), 2.0)})
    error = refused(strict=True)
    assert_says(error, given=("1 parameters changed",), expected="linear layers only", do="remove --strict")
    assert take(*pair, tmp_path / "expert", rank=2).left[0].name == "model.norm.weight"


def test_too_little_memory_names_the_largest_module(refused):
    error = refused(max_memory=1000)
    assert_says(
        error,
        given=("model.layers.0.mlp.gate_proj (48 x 32) needs", "for the randomised SVD", "13 more modules do not fit"),
        expected="at most 1000.0 bytes",
        do="--max-memory",
    )


def test_the_target_is_never_overwritten(pair, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for target, what in ((tmp_path / "full", "is not empty"), (tmp_path / "full" / "mine", "is a file")):
        with pytest.raises(ExtractionError) as caught:
            take(*pair, target, rank=2)
        assert_says(caught.value, given=(what,), expected="folder", do="another --out")
    with pytest.raises(ExtractionError) as caught:
        take(*pair, tmp_path / "full" / "mine" / "below", rank=2)
    assert_says(caught.value, given=("cannot be created in",), expected=None, do="another --out")


def test_an_interrupted_run_leaves_nothing(pair, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("spectr.extraction.outcome.card", stop)
    with pytest.raises(KeyboardInterrupt):
        take(*pair, tmp_path / "out" / "expert", rank=2)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_kill_left_is_swept_up(pair, tmp_path):
    scratch = tmp_path / "out" / ".expert.partial"
    scratch.mkdir(parents=True)
    (scratch / "old").touch()
    take(*pair, tmp_path / "out" / "expert", rank=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["expert"]
    assert not (tmp_path / "out" / "expert" / "old").exists()


def test_no_such_model(refused, tmp_path):
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "empty").mkdir()
    for source, what in (
        ("./nowhere", "no folder ./nowhere"),
        (file, "is a file"),
        (tmp_path / "empty", "no config.json"),
    ):
        error = refused(ModelError, tuned=source)
        assert_says(error, given=(what,), expected="a folder with a transformers model", do="check the path")


def test_a_hub_that_does_not_answer(refused):
    error = refused(ModelError, tuned="org/model@main")
    assert_says(error, given=("'org/model' is not a folder",), expected="a Hub id", do="check the name, the network")


def test_a_hub_id_is_fetched_without_pickles(monkeypatch, tmp_path):
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate_model("org/model@v2") == tmp_path
    assert (asked["repo"], asked["revision"]) == ("org/model", "v2")
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_weights_that_are_missing_or_pickled(refused, pair):
    (pair[1] / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(ModelError).given
    (pair[1] / "pytorch_model.bin").touch()
    error = refused(ModelError)
    assert_says(error, given=("pickle file (pytorch_model.bin)",), expected="safetensors", do="if you trust it")


def test_missing_and_damaged_shards_are_reported_together(refused, pair):
    (pair[1] / "b.safetensors").write_bytes(b"no")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (pair[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    text = str(refused(ModelError))
    assert "2 problems" in text
    for shard in ("a.safetensors", "b.safetensors"):
        assert f"{shard} cannot be read as safetensors" in text


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"x": "../y"}}'])
def test_a_damaged_index(refused, pair, text):
    (pair[1] / "model.safetensors.index.json").write_text(text)
    assert_says(refused(ModelError), given=("no weight_map",), expected=None, do="download or save")


@pytest.mark.parametrize("config", [{}, {"model_type": "nothing-known"}, {"model_type": "vit"}])
def test_an_architecture_that_transformers_does_not_build(refused, pair, config):
    (pair[0] / "config.json").write_text(json.dumps(config))
    error = refused(ModelError)
    assert_says(error, given=("cannot build a language model",), expected="AutoModelForCausalLM", do="update")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "neither rank nor energy"),
        ({"rank": 2, "energy": 0.5}, "both rank and energy"),
        ({"rank": 0}, "rank=0"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"energy": 0.5, "max_rank": 0}, "max_rank=0"),
    ],
)
def test_settings_of_the_truncation(given, says):
    for kind in (Truncation, Extraction):
        with pytest.raises(ExtractionError, match=says):
            kind(**given)


def test_settings_are_judged_together():
    with pytest.raises(ExtractionError) as caught:
        Extraction(rank=-1, method="fast", dtype="int8", seed=-1, oversampling=-1, power_iterations=-1, max_memory=0)
    for part in ("rank=-1", "method='fast'", "dtype='int8'", "seed=-1", "oversampling=-1", "max_memory"):
        assert part in str(caught.value)
    assert "auto or exact or randomised" in str(caught.value)


def test_bytes_for_people():
    assert [shown_bytes(n) for n in (0, 999, 1 << 20, 5 << 29)] == ["0.0 bytes", "999.0 bytes", "1.0 MiB", "2.5 GiB"]


def test_buffers_in_the_files_are_not_parameters(pair, tmp_path):
    for number, folder in enumerate(pair):
        rewrite(folder, lambda t, n=number: {**t, "model.layers.0.mask": torch.full((4, 4), n, dtype=torch.uint8)})
    assert take(*pair, tmp_path / "expert", rank=2).left == ()
    rewrite(pair[0], lambda t: {**t, "experts.w": torch.zeros(3)})
    rewrite(pair[1], lambda t: {**t, "experts.w": torch.ones(3)})
    [left] = take(*pair, tmp_path / "second", rank=2).left
    assert (left.name, left.kind) == ("experts.w", "no parameter of the architecture")


def test_extract_takes_strings(pair, tmp_path):
    extract(str(pair[1]), str(pair[0]), str(tmp_path / "expert"), Extraction(rank=1))
    assert (tmp_path / "expert" / "adapter_config.json").is_file()
