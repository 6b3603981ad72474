"""Experts of different ranks and modules for a tiny chat model, calibrated and indexed."""

from __future__ import annotations

import pytest

from models import peft_adapter
from scaling import SPARSE, TEXTS, make_library
from spectr import ExpertLibrary, build_index, calibrate
from text_model import make_model, make_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    make_library(root)
    peft_adapter(make_model(), root / "wasp", 99, rank=4, targets=list(SPARSE))
    return root


@pytest.fixture(scope="module")
def library(root):
    plain = ExpertLibrary.open(root)
    known = plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), texts=TEXTS, null=0))
    return build_index(make_model(), known)
