"""Modules that no text reaches, as those of a vision tower: they take no part in evidence, and that is reported."""

from __future__ import annotations

import logging

import pytest
import torch
from calibrating import PROMPTS, TEXTS, Q, ids_of
from torch import nn

from models import random_factors, write_adapter
from spectr import Calibrated, ExpertLibrary, Shortlist, build_index, calibrate, compose
from spectr.errors import CompositionError
from spectr.library import Calibration
from spectr.ops.dispatch import report_once
from text_model import make_model, make_tokenizer

SPARE = "model.spare"  # a layer that is called for no text


def base():
    model = make_model()
    model.model.spare = nn.Linear(32, 32)
    return model


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Two experts that texts reach; of a third only some modules, and of a fourth none."""
    root = tmp_path_factory.mktemp("experts")
    names = {"ants": [Q], "bees": [Q], "cats": [Q, SPARE], "dogs": [SPARE]}
    for seed, (name, modules) in enumerate(names.items()):
        write_adapter(root / name, {module: random_factors(4, 32, 32, seed) for module in modules})
    plain = ExpertLibrary.open(root)
    return plain.with_calibration(calibrate(base(), plain, make_tokenizer(), texts=TEXTS, null=4))


def without(library, *names):
    for name in names:
        library = library.without(name)
    return library


def test_a_calibration_names_them_and_keeps_that(library, tmp_path):
    known = library.calibration
    assert known.unmeasured == {SPARE}
    assert known.of("cats", SPARE) == (None, None, None)
    assert set(known.rms["cats"]) == {Q}
    known.save(tmp_path)
    assert Calibration.load(tmp_path).unmeasured == {SPARE}
    assert calibrate(base(), library, make_tokenizer(), null=4).unmeasured == {SPARE}


def test_an_expert_that_adapts_nothing_else_is_reported_and_never_chosen(library, caplog):
    model = base()
    report_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        routed = compose(model, library, Calibrated(abstain=None))
    assert f"expert 'dogs' adapts only modules that no text of the calibration reaches ({SPARE})" in caplog.text
    assert "'cats'" not in caplog.text
    chosen = [routed.prompt.decide(input_ids=ids_of(prompt)) for prompt in PROMPTS]
    assert all(verdict_BE[0, routed.experts.index("dogs")] == 0 for verdict_BE in chosen)
    known = compose(base(), without(library, "dogs"), Calibrated(abstain=None))
    for prompt, verdict_BE in zip(PROMPTS, chosen, strict=True):
        assert torch.equal(known.prompt.decide(input_ids=ids_of(prompt)), verdict_BE[:, :3])


def test_a_shortlist_refuses_it(library):
    with pytest.raises(CompositionError, match="no text of the calibration reaches what is adapted by dogs"):
        compose(base(), build_index(base(), library), Shortlist(size=2))
    routed = compose(base(), build_index(base(), without(library, "dogs")), Shortlist(size=2))
    assert routed.prompt.decide(input_ids=ids_of(PROMPTS[0])).shape == (1, 3)
