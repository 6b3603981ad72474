"""A library on disk, and the same one calibrated."""

from __future__ import annotations

import pytest
from calibrating import RANKS, TEXTS

from models import peft_library
from spectr import ExpertLibrary, calibrate
from text_model import make_model, make_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    peft_library(make_model(), root, RANKS)
    return root


@pytest.fixture(scope="module")
def library(root):
    plain = ExpertLibrary.open(root)
    return plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), texts=TEXTS, null=0))
