"""Copies, traces and exports of composed models of several families: as the model itself, or refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from families import FAMILIES
from models import close, peft_adapter
from spectr import Calibrated, ExpertLibrary, Spectr, calibrate, compose
from spectr.errors import CompositionError
from text_model import make_tokenizer
from trained_modules import ROWS

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
]
NAMES = ("gpt2", "opt", "t5", "bert", "mamba", "mixtral")
DECODERS = ("gpt2", "opt", "mamba", "mixtral")


class Tensors(nn.Module):
    """A model that takes and returns tensors alone."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given):
        made = self.model(**dict(zip(self.names, given, strict=True)), use_cache=False)
        return made["logits"] if "logits" in made else made[0]


@pytest.fixture(scope="module", params=NAMES)
def family(request, tmp_path_factory):
    """A family, its library of three experts, and two inputs."""
    known, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("ants", "bees", "cats"), start=1):
        peft_adapter(known.build(), folder / name, seed, targets=known.plain, **known.options)
    return request.param, ExpertLibrary.open(folder), known.inputs(seed=1), known.inputs(seed=2)


WAYS = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "trace": lambda model, given: torch.jit.trace(model, given, check_trace=False),
    "export": lambda model, given: torch.export.export(model, given).module(),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_each_form_chooses_for_each_input(family, way):
    name, library, one, other = family
    routed = compose(FAMILIES[name].build(), library, Spectr(top_k=2))
    model = Tensors(routed.model, list(one))
    want = model(*other.values())
    form = WAYS[way](model, tuple(one.values()))
    close(form(*other.values()), want)


@pytest.mark.parametrize("way", ["trace", "export"])
@torch.no_grad()
def test_a_prompts_decision_is_not_captured(family, way):
    name, library, one, _ = family
    routed = compose(FAMILIES[name].build(), library, ROWS)
    with pytest.raises(CompositionError, match="cannot be exported or traced"):
        WAYS[way](Tensors(routed.model, list(one)), tuple(one.values()))


@pytest.mark.parametrize("family", DECODERS, indirect=True)  # a calibration is of a decoder
@torch.no_grad()
def test_a_copy_decides_for_its_own_prompts(family):
    name, library, _, other = family
    texts = ["what is the sky", "the film is good"]
    known = calibrate(FAMILIES[name].build(), library, make_tokenizer(), texts=texts, null=2)
    routed = compose(FAMILIES[name].build(), library.with_calibration(known), Calibrated(abstain=None))
    want = routed.model(**other).logits
    for way in ("deepcopy", "pickle"):
        copied = WAYS[way](routed, ())
        assert torch.equal(copied.model(**other).logits, want)
        assert torch.equal(copied.remove()(**other).logits, FAMILIES[name].build()(**other).logits)
