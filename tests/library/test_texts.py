"""Tokenizers and chat templates that come with adapters are compared with the base model's."""

import json
import shutil

import pytest
import torch

from adapters_on_disk import tiny_llama, write_adapter
from spectr import Calibrated, ExpertLibrary, Oracle, Spectr, build_index, calibrate, compose
from spectr.adapters.text_facts import TextFacts, text_remarks
from spectr.composed_model.quantization_config import Settings
from spectr.errors import AdapterError, CompositionError
from spectr.hashing import known_sha256
from spectr.library import Calibration, LibraryStore
from spectr.ops.dispatch import report_once
from text_model import make_model, make_tokenizer, save_experts

VOCABULARY = {"<s>": 0, "a": 1, "b": 2}
ADDED = [{"id": 0, "content": "<s>"}]


def texts(folder, vocabulary=VOCABULARY, added=ADDED, template="{{ messages }}", end="</s>", merges=("a b",), **rules):
    folder.mkdir(exist_ok=True, parents=True)
    whole = {"model": {"vocab": vocabulary, "merges": merges}, "added_tokens": added, **rules}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": end}))
    return folder


@pytest.fixture
def base(tmp_path):
    folder = texts(tmp_path / "base")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 17}))
    return folder


def expert(tmp_path, base, **changes):
    folder = write_adapter(tmp_path / "a", base_model_name_or_path=str(base))
    return texts(folder, **changes) if changes else folder


def named(base):
    model = tiny_llama()
    model.config._name_or_path = str(base)
    return model


def routed(base, library):
    report_once.cache_clear()
    return compose(named(base), library, Oracle(expert="a"))


REFUSED = {
    "another vocabulary": ({"vocabulary": {"<s>": 0, "b": 1, "a": 2}}, "vocabulary differs from the base model's"),
    "an id of another token": ({"added": [*ADDED, {"id": 0, "content": "<t>"}]}, "tokenizer uses for other tokens"),
    "a token of another id": ({"added": [{"id": 5, "content": "<s>"}]}, "uses for other tokens: <s>"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_prompts_that_would_be_read_otherwise_are_refused(tmp_path, base, changes, reason):
    folder = expert(tmp_path, base, **changes)
    with pytest.raises(AdapterError, match=reason):
        LibraryStore(tmp_path / "library").add("a", folder)
    library = ExpertLibrary.from_adapters({"a": folder})
    with pytest.raises(CompositionError, match=reason):
        routed(base, library)
    shutil.copytree(folder, tmp_path / "experts" / "a")
    with pytest.raises(CompositionError, match=reason):  # of a composed folder, as vLLM opens it
        Settings(library=str(tmp_path / "experts"), router={"name": "spectr", "top_k": 1}).open_library(base)
    one = torch.ones(1, 1, dtype=torch.bool)
    texts = {"input_ids": one.long(), "counted": one, "real": one, "settings": {}}
    known = Calibration(means={}, rms={"a": {}}, sha256={"a": known_sha256(library["a"].weights)}, **texts)
    with pytest.raises(CompositionError, match=reason):
        build_index(named(base), library.with_calibration(known))


REPORTED = {
    "a chat template": ({"template": "{{ x }}"}, "has another chat template than the base model"),
    "an added token": ({"added": [*ADDED, {"id": 3, "content": "<t>"}]}, "tokenizer does not have: <t>"),
    "rules": ({"normalizer": {"type": "Lowercase"}}, "by other rules than the base model's: normalizer"),
    "merges": ({"merges": ["b a"]}, "by other rules than the base model's: merges"),
    "an end": ({"end": "<t>"}, "ends answers with <t>, the base model with </s>"),
    "a resized embedding": (
        {"added": [*ADDED, {"id": 17, "content": "<t>"}]},
        "has 18 tokens, the base model 17",
    ),
}


@pytest.mark.parametrize(("changes", "remark"), REPORTED.values(), ids=REPORTED.keys())
def test_what_else_differs_is_reported(tmp_path, base, caplog, changes, remark):
    folder = expert(tmp_path, base, **changes)
    routed(base, ExpertLibrary.from_adapters({"a": folder}))
    assert remark in caplog.text
    caplog.clear()
    LibraryStore(tmp_path / "library").add("a", folder)
    assert any(remark in one for one in text_remarks(folder, str(base)))
    routed(base, ExpertLibrary.open(tmp_path / "library"))  # which keeps the facts without the files
    assert remark in caplog.text
    assert ExpertLibrary.open(tmp_path / "library")["a"].weights.parent.joinpath("text.json").is_file()


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
LARGER = [*ADDED, {"id": 17, "content": "<t>"}]


@pytest.mark.parametrize(
    ("of_base", "changes"),
    [
        ({}, {}),
        ({}, {"template": "{{ messages }}\n", "merges": [["a", "b"]]}),
        ({"pre_tokenizer": BYTES}, {"pre_tokenizer": BYTES | {"use_regex": True}}),  # a default of newer files
        ({"added": LARGER}, {"added": LARGER}),  # the base model has no row for it either
    ],
)
def test_nothing_is_reported_of_what_is_alike(tmp_path, base, caplog, of_base, changes):
    texts(base, **of_base)
    folder = expert(tmp_path, base, **changes)
    routed(base, ExpertLibrary.from_adapters({"a": folder}))
    assert not caplog.text
    assert text_remarks(folder, str(base)) == []


def test_a_base_model_that_is_not_here_is_named(tmp_path):
    folder = texts(write_adapter(tmp_path / "a", base_model_name_or_path="no/where"))
    assert "not on this machine" in text_remarks(folder, "no/where")[0]
    LibraryStore(tmp_path / "library").add("a", folder)


def test_templates_and_tokens_are_found_wherever_versions_keep_them(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    for folder in (new, old):
        folder.mkdir()
    (new / "chat_template.jinja").write_text("{{ x }}\n")
    (new / "added_tokens.json").write_text(json.dumps({"<t>": 3}))
    several = [{"name": "tools", "template": "y"}, {"name": "default", "template": "{{ x }}"}]
    settings = {"chat_template": several, "added_tokens_decoder": {"3": {"content": "<t>"}}}
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    assert TextFacts.read(new) == TextFacts.read(old)
    (old / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["<s>", 0.0], ["a", -1.0]]}}))
    assert TextFacts.read(old).vocabulary == TextFacts.read(texts(tmp_path / "b", {"<s>": 0, "a": 1})).vocabulary
    assert TextFacts.read(tmp_path) is None


def test_a_calibration_of_another_base_model_is_reported(tmp_path, caplog):
    """Sizes fit and experts are the same, so that nothing else tells that means and scales are another model's."""
    report_once.cache_clear()
    library = ExpertLibrary.open(save_experts(tmp_path, ("ants", "bees")))
    one, other = make_model(), make_model()
    one.config._name_or_path, other.config._name_or_path = "/models/one", "org/other"
    known = calibrate(one, library, make_tokenizer(), texts=["what is it"], null=0)
    library = library.with_calibration(known)
    compose(one, library, Calibrated()).remove()
    assert "was calibrated with" not in caplog.text
    compose(other, library, Spectr(top_k=1)).remove()
    assert "was calibrated with" not in caplog.text
    compose(other, library, Calibrated())
    assert "calibrated with the base model one, but this model is org/other" in caplog.text
