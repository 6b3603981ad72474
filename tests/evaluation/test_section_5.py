"""Costs as section 5 counts them, worked out by hand for two modules."""

from __future__ import annotations

import pytest

from models import random_factors, write_adapter
from spectr import ExpertLibrary
from spectr.evaluation.experiments.costs import by_method


def library(root, ranks):
    for seed, rank in enumerate(ranks):
        factors = {"wide": random_factors(rank, 16, 8, seed), "tall": random_factors(rank, 8, 24, seed)}
        write_adapter(root / f"expert{seed}", factors)
    opened = ExpertLibrary.open(root)
    return [opened[name] for name in opened]


def test_the_counts_of_six_experts_of_rank_4(tmp_path):
    found = by_method(library(tmp_path, [4] * 6))
    inputs, outputs = 16 + 8, 8 + 24
    adapters = 2 * 6 * 4 * (inputs + outputs)
    assert found["arrow"].scores == 2 * 6 * inputs
    assert found["spectr"].scores == 4 * found["arrow"].scores, "the rank times as much"
    assert found["arrow"][1:] == (2 * 4 * (inputs + outputs), 4 * 2 * 4 * (inputs + outputs), adapters + 2 * 6 * inputs)
    assert found["spectr"][1:] == (2 * 4 * outputs, 4 * 2 * 4 * outputs, adapters)
    assert found["mu, folded into W"] == (0, 0, 0, 0)
    assert found["mu, factors merged"] == (0, 2 * 4 * (inputs + outputs), 2 * 4 * (inputs + outputs), adapters / 6)


def test_fewer_experts_than_are_chosen_and_the_mean_of_unequal_ranks(tmp_path):
    found = by_method(library(tmp_path, [2, 6]))
    assert found["spectr"].scores == 2 * 2 * 4 * (16 + 8)
    assert found["spectr"].outputs == pytest.approx(2 * found["spectr"].merged)
