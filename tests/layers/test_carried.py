"""A model that already carries adapters is refused, with what unloads them."""

import copy

import pytest

from models import close, logits, peft_adapter, peft_model, tiny_llama, tokens
from spectr import ExpertLibrary, Oracle, compose
from spectr.errors import CompositionError, ModelError
from spectr.models import load_model

ids = tokens()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return peft_adapter(tiny_llama(), tmp_path_factory.mktemp("carried") / "a", 1, targets=["q_proj", "up_proj"])


def routed(model, folder):
    return compose(model, ExpertLibrary.from_adapters({"a": folder}), Oracle(expert="a"))


def carrying(folder, way):
    if way == "load_adapter":
        model = tiny_llama()
        model.load_adapter(str(folder), adapter_name="mine")
        return model
    model = peft_model(tiny_llama(), folder)
    if way == "merged":
        model.merge_adapter()
    return model.get_base_model() if way == "the model in PEFT's" else model


CURES = {
    "load_adapter": ("(mine)", r"model\.delete_adapter\(\['mine'\]\) unloads"),
    "PeftModel": ("(default)", r"model\.unload\(\) returns"),
    "merged": ("(default)", r"merge_and_unload"),
    "the model in PEFT's": ("(default)", r"the PeftModel around it\.unload\(\)"),
}


@pytest.mark.parametrize(("way", "names", "cure"), [(way, *rest) for way, rest in CURES.items()], ids=CURES.keys())
def test_carried_adapters_are_refused_by_name(folder, way, names, cure):
    model = carrying(folder, way)
    before = logits(model, ids)
    with pytest.raises(CompositionError, match=cure) as caught:
        routed(model, folder)
    assert f"already carries PEFT adapters {names}" in caught.value.given
    assert logits(model, ids).equal(before)


def test_the_cures_leave_the_base_model(folder):
    want = logits(peft_model(tiny_llama(), folder), ids)
    unloaded = carrying(folder, "PeftModel").unload()
    deleted = carrying(folder, "load_adapter")
    deleted.delete_adapter(["mine"])
    for model in (unloaded, deleted):
        base = logits(copy.deepcopy(model), ids)
        handle = routed(model, folder)
        close(logits(model, ids), want)
        handle.remove()
        assert logits(model, ids).equal(base)


def test_an_adapters_folder_is_no_base_model(folder):
    with pytest.raises(ModelError, match=r"is an adapter(.|\n)*a base model alone(.|\n)*library add NAME"):
        load_model(str(folder))
