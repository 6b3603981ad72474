"""A composed model copied, pickled, traced and exported: as it was, or refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from guides import Guide
from models import close, peft_library, tiny_llama, tokens
from spectr import Arrow, Calibrated, Lag, Oracle, Shortlist, Spectr, build_index, calibrate, compose, get_router
from spectr.errors import CompositionError
from text_model import make_tokenizer

# torch.jit is deprecated, and still used; its tracer warns of every shape that it takes for a constant
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")]
ids, others = tokens(seed=1), tokens(seed=2)
EXPERTS = {"ants": 4, "bees": 4, "cats": 4, "dogs": 4, "eels": 4}
TOKENS = [Oracle(expert="bees"), Arrow(top_k=1), Spectr(top_k=1), Spectr(top_k=2), Lag(shortlist=2, top_k=1)]
TOKENS += [Spectr(top_k=2, combine="ties:density=0.5")]
PROMPTS = Calibrated(abstain=None)


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


class EmptyGuide(Guide):
    """Finds nothing in a prompt."""

    def reader(self, descriptions, experts):
        return lambda input_ids, **_: torch.zeros(len(input_ids), len(experts))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    model = tiny_llama(num_hidden_layers=1)
    library = peft_library(model, tmp_path_factory.mktemp("adapters"), EXPERTS)
    known = calibrate(model, library, make_tokenizer(), texts=["what is the sky", "the film is good"], null=2)
    return build_index(model, library.with_calibration(known)).with_descriptions(dict.fromkeys(EXPERTS, "insects"))


def routed(library, router, **options):
    return compose(tiny_llama(num_hidden_layers=1), library, router, **options)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value)), "torch.save": saved}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("router", [Spectr(top_k=2), PROMPTS], ids=["token", "prompt"])
def test_a_copy_is_a_model_of_its_own(library, router, way):
    handle = routed(library, router)
    want = handle.model(others).logits
    model, copied = WAYS[way](handle.model), WAYS[way](handle)
    handle.remove()
    assert torch.equal(model(others).logits, want)
    assert torch.equal(copied.model(others).logits, want)
    plain = copied.remove()(others).logits
    assert torch.equal(plain, tiny_llama(num_hidden_layers=1)(others).logits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["shortlist", "glider-spectr"])
def test_what_reads_prompts_by_its_own_model_does_not_go_along(library, name, way):
    router = Shortlist(size=2) if name == "shortlist" else get_router(name)
    handle = routed(library, router, guide=EmptyGuide())
    for value in (handle.model, handle):
        with pytest.raises(CompositionError, match="neither be copied nor pickled"):
            WAYS[way](value)


@torch.no_grad()
@pytest.mark.parametrize("router", TOKENS, ids=str)
def test_a_trace_chooses_for_each_input(library, router):
    model = routed(library, router).model
    traced = torch.jit.trace(Logits(model), (ids,), check_trace=False)
    close(traced(others), model(others).logits)


@torch.no_grad()
def test_an_export_chooses_for_each_input(library):
    model = routed(library, Spectr(top_k=1)).model
    close(torch.export.export(Logits(model), (ids,)).module()(others), model(others).logits)


@torch.no_grad()
@pytest.mark.parametrize("router", [Oracle(expert="bees"), Spectr(top_k=2)], ids=str)
def test_a_model_is_exported_without_a_module_around_it(library, router):
    model = routed(library, router).model
    exported = torch.export.export(model, (ids,), {"use_cache": False}).module()
    close(exported(others, use_cache=False).logits, model(others).logits)


CAPTURES = {
    "trace": lambda model: torch.jit.trace(model, (ids,), check_trace=False),
    "export": lambda model: torch.export.export(model, (ids,), strict=False),
    "strict export": lambda model: torch.export.export(model, (ids,), strict=True),
}


@torch.no_grad()
@pytest.mark.parametrize("around", [Logits, lambda model: model], ids=["inside", "itself"])
@pytest.mark.parametrize("way", CAPTURES)
def test_a_prompts_decision_is_not_captured(library, way, around):
    handle = routed(library, PROMPTS)
    with pytest.raises(CompositionError, match="always use this decision"):
        CAPTURES[way](around(handle.model))
