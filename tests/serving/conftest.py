"""A library of three experts of unequal ranks, calibrated and indexed, for the tiny chat model."""

from __future__ import annotations

import pytest

from models import peft_library
from spectr import ExpertLibrary, build_index, calibrate
from text_model import make_model, make_tokenizer

RANKS = {"ants": 4, "bees": 2, "cats": 8}
TEXTS = ["what is the sky", "the film is good", "who is it", "red blue green of the grass"]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    peft_library(make_model(), root, RANKS)
    plain = ExpertLibrary.open(root)
    known = plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), texts=TEXTS))
    return build_index(make_model(), known)
