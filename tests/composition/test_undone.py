"""A change of a model's experts that raises, at whatever step, leaves the model and its handle as they were."""

from __future__ import annotations

import importlib

import pytest
import torch

from guides import Guide
from models import identities, logits, peft_adapter, peft_library, tiny_llama, tokens
from spectr import Calibrated, Shortlist, Spectr, build_index, calibrate, compose, get_router
from text_model import make_tokenizer

ids = tokens()
ROUTED, CALLS, PAGED = "spectr.composition.routed", "spectr.prompts.calls", "spectr.composition.paged"
PLANNED = [(ROUTED, "make_plan", 1), (ROUTED, "check_needs", 1), (ROUTED, "side_data", 1)]
MADE = [(ROUTED, "prepare_module", 2), (ROUTED, "stacked", 2), (ROUTED, "placement", 2)]
PLACED = [(ROUTED, "swap_module", 1), (ROUTED, "swap_module", 3)]
CALLED = [(CALLS, "Layouts", 1), (CALLS, "entries_of", 1), (CALLS, "Generation", 1), (ROUTED, "Calls", 1)]
DECIDED = [(ROUTED, "Readers", 1), (ROUTED, "FactorSets", 1), (ROUTED, "PromptDecision", 1)]
PAGES = [(PAGED, "make_plan", 1), (PAGED, "ExpertCache", 1), (PAGED, "RoutedLinear", 2), (PAGED, "FactorSets", 1)]
STEPS = {
    Spectr(top_k=2): [*PLANNED, *MADE, *PLACED, *CALLED],
    Calibrated(abstain=None): [*PLANNED, *MADE, *PLACED, *DECIDED, *CALLED],
    Shortlist(size=2): [*PAGES, *PLACED, *CALLED],
}
CASES = {
    f"{type(router).__name__} {step[1]} {step[2]}": (router, step) for router, steps in STEPS.items() for step in steps
}


class BrokenStepError(Exception):
    pass


def breaks(monkeypatch, module: str, name: str, at: int) -> None:
    """Have the ``at``-th call of a function or class of a module raise."""
    own, count = getattr(importlib.import_module(module), name), 0

    def step(*args, **kwargs):
        nonlocal count
        count += 1
        if count == at:
            raise BrokenStepError
        return own(*args, **kwargs)

    monkeypatch.setattr(f"{module}.{name}", step)


def state(model):
    """Each module's own attributes, which hold replaced methods too, and its modules."""
    return identities(model), {name: {**vars(m)} for name, m in model.named_modules(remove_duplicate=False)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    peft_adapter(llama(), root / "extra", seed=9)
    return root


@pytest.fixture(scope="module")
def library(root):
    model = llama()
    library = peft_library(model, root / "known", dict.fromkeys(("ants", "bees", "cats"), 4))
    known = calibrate(model, library, make_tokenizer(), texts=["what is the sky", "the film is good"], null=2)
    return build_index(model, library.with_calibration(known)).with_descriptions(dict.fromkeys(library.names, "insect"))


def llama():
    return tiny_llama(num_hidden_layers=1)


@pytest.mark.parametrize(("router", "step"), CASES.values(), ids=CASES.keys())
def test_a_model_that_cannot_be_composed_is_as_before(library, monkeypatch, router, step):
    model = llama()
    before, out = state(model), logits(model, ids)
    breaks(monkeypatch, *step)
    with pytest.raises(BrokenStepError):
        compose(model, library, router)
    assert state(model) == before
    assert torch.equal(logits(model, ids), out)
    compose(model, library, router).remove()  # later calls of the step work
    assert state(model) == before


@pytest.mark.parametrize(("router", "step"), CASES.values(), ids=CASES.keys())
def test_a_change_that_raises_leaves_the_composition_as_before(library, root, monkeypatch, router, step):
    model = llama()
    plain, plain_out = state(model), logits(model, ids)
    routed = compose(model, library, router)
    layers, out = identities(model), logits(model, ids)
    held = {name: value for name, value in vars(routed).items() if name != "_calls"}
    changes = [lambda: routed.allow(["cats", "ants"]), lambda: routed.discard("bees")]
    changes += [] if isinstance(router, (Calibrated, Shortlist)) else [lambda: routed.add("extra", root / "extra")]
    for change in changes:
        with monkeypatch.context() as patch:
            breaks(patch, *step)
            with pytest.raises(BrokenStepError):
                change()
        assert identities(model) == layers
        assert {name: value for name, value in vars(routed).items() if name != "_calls"} == held
        assert torch.equal(logits(model, ids), out)
    with monkeypatch.context() as patch:
        breaks(patch, ROUTED, "swap_module", 3)
        with pytest.raises(BrokenStepError):
            routed.remove()
    assert identities(model) == layers
    assert torch.equal(logits(model, ids), out)
    routed.remove()
    assert state(model) == plain
    assert torch.equal(logits(model, ids), plain_out)


def test_a_guide_that_raises_leaves_the_model_as_before(library):
    class Without(Guide):
        def reader(self, descriptions, experts):
            raise BrokenStepError

    model = llama()
    before = state(model)
    with pytest.raises(BrokenStepError):
        compose(model, library, get_router("glider-spectr"), guide=Without())
    assert state(model) == before


def test_a_cache_goes_on_after_a_change_that_raised(library, monkeypatch):
    routed = compose(llama(), library, Calibrated(abstain=None))
    with torch.no_grad():
        caches = [routed.model(ids[:, :5], use_cache=True).past_key_values for _ in range(2)]
        want = routed.model(ids[:, 5:], past_key_values=caches[0]).logits
        breaks(monkeypatch, ROUTED, "Calls", 1)
        with pytest.raises(BrokenStepError):
            routed.allow(["ants"])
        assert torch.equal(routed.model(ids[:, 5:], past_key_values=caches[1]).logits, want)
