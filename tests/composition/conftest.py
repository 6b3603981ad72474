"""Adapters on disk that the tests of composing share."""

from __future__ import annotations

import pytest
from composing import RANKS, UNEQUAL

from models import (
    peft_adapter,
    peft_library,
    tiny_llama,
)
from spectr import ExpertLibrary


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Adapters of one rank, one folder each, and an unrelated one next to them."""
    root = tmp_path_factory.mktemp("adapters")
    peft_library(tiny_llama(), root / "equal", RANKS)
    peft_library(tiny_llama(), root / "unequal", UNEQUAL)
    peft_adapter(tiny_llama(), root / "extra" / "eels", seed=99, rank=4)
    # partial: ants everywhere, bees in attention, cats in one module, and nobody in layer 1's down_proj
    everywhere = r".*layers\.0\..*_proj|.*layers\.1\.(self_attn\.._proj|mlp\.(up|gate)_proj)"
    peft_adapter(tiny_llama(), root / "partial" / "ants", seed=1, targets=everywhere)
    peft_adapter(tiny_llama(), root / "partial" / "bees", seed=2, targets=["q_proj", "v_proj"])
    peft_adapter(tiny_llama(), root / "partial" / "cats", seed=3, targets=r".*layers\.0\.self_attn\.q_proj")
    return root


@pytest.fixture
def library(root):
    return ExpertLibrary.open(root / "equal")


@pytest.fixture
def model():
    return tiny_llama()
