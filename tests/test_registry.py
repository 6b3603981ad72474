"""Routers by name."""

from __future__ import annotations

import pytest

import spectr
from models import (
    types_unchecked,
)
from spectr import (
    Arrow,
    Calibrated,
    Glider,
    Lag,
    Oracle,
    Phatgoose,
    Seqr,
    Shortlist,
    Spectr,
    Uniform,
)
from spectr.errors import CompositionError
from spectr.routers import Router, get_router, registry, router_names

UNKNOWN_COMBINATION = (
    "unknown combination combine='sum'\n  to do: known: dare, dare-ties, factors, knots, outputs, ties"
)

BY_NAME = {
    "arrow": Arrow(),
    "glider": Glider(),
    "glider-global": Glider(local=None),
    "glider-spectr": Glider(local=Spectr(top_k=1)),
    "lag": Lag(),
    "mu": Uniform(),
    "phatgoose": Phatgoose(),
    "seqr": Seqr(),
    "shortlist": Shortlist(),
    "spectr": Spectr(),
    "spectr-code": Spectr(score="projection", combine="factors"),
    "spectr-paper": Spectr(combine="factors"),
    "spectr-projection": Spectr(score="projection"),
    "spectr-softmax": Spectr(weights="softmax"),
    "uniform": Uniform(),
    "calibrated": Calibrated(),
    "calibrated-prior": Calibrated(level="prior"),
    "calibrated-token": Calibrated(level="token", top_k=4),
}


@pytest.mark.parametrize(("name", "router"), BY_NAME.items(), ids=BY_NAME.keys())
def test_a_name_stands_for_its_settings(name, router):
    assert get_router(name) == router
    assert isinstance(router, Router)


def test_names_are_all_names_in_alphabetical_order():
    assert router_names() == tuple(sorted([*BY_NAME, "oracle"]))


def test_options_are_settings():
    assert get_router("spectr-paper", top_k=2) == Spectr(combine="factors", top_k=2)
    assert get_router("oracle", expert="sql") == Oracle(expert="sql")


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    with pytest.raises(CompositionError, match="unknown router 'sepctr'") as caught:
        get_router("sepctr")
    assert caught.value.do == f"did you mean 'spectr'? known: {', '.join(router_names())}"


@pytest.mark.parametrize("name", ["arrow", "spectr-paper"])
def test_an_unknown_option_is_answered_with_those_that_are_known(name):
    with pytest.raises(CompositionError, match=f"router '{name}' does not take these options: topk") as caught:
        get_router(name, topk=2)
    assert "top_k, weights, temperature, combine" in caught.value.expected


def test_a_missing_option_is_asked_for():
    with pytest.raises(CompositionError, match="router 'oracle'") as caught:
        get_router("oracle")
    assert caught.value.do == "--expert ..., or get_router('oracle', expert=...)"


def test_a_third_partys_router_is_found_by_entry_point(monkeypatch):
    class Point:
        name = "theirs"

        @staticmethod
        def load():
            return lambda top_k=3: Spectr(top_k=top_k, weights="softmax")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point] if group == "spectr.routers" else [])
    assert "theirs" in router_names()
    assert get_router("theirs") == Spectr(top_k=3, weights="softmax")
    assert get_router("theirs", top_k=1) == Spectr(top_k=1, weights="softmax")
    with pytest.raises(CompositionError, match="router 'theirs' does not take these options: k"):
        get_router("theirs", k=1)
    with pytest.raises(CompositionError, match="did you mean 'theirs'"):
        get_router("their")


# Settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spectr(top_k=0), "top_k=0\n  expected: a whole number of at least 1"),
        (lambda: Arrow(top_k=-2), "top_k=-2\n  expected: a whole number of at least 1"),
        (lambda: Spectr(score="cosine"), "score='cosine'\n  expected: 'spectral' or 'projection'"),
        (lambda: Spectr(combine="sum"), UNKNOWN_COMBINATION),
        (lambda: Arrow(combine="sum"), UNKNOWN_COMBINATION),
        (lambda: Uniform(combine="sum"), UNKNOWN_COMBINATION),
        (lambda: Spectr(weights="equal"), "weights='equal'\n  expected: 'uniform' or 'softmax'"),
        (lambda: Arrow(temperature=0.0), "temperature=0.0\n  expected: a finite number above zero"),
        (lambda: Spectr(temperature=-1.0), "temperature=-1.0\n  expected: a finite number above zero"),
    ],
)
def test_settings_out_of_range_are_refused_when_the_router_is_made(make, message):
    with types_unchecked(), pytest.raises(CompositionError) as caught:
        make()
    assert str(caught.value) == message


def test_a_router_is_its_settings():
    assert Spectr(top_k=2) == Spectr(top_k=2)
    assert hash(Arrow()) == hash(Arrow())
    with pytest.raises(AttributeError):
        Spectr().top_k = 3


def test_every_router_of_the_package_can_be_imported_from_its_front():
    assert {spectr.Spectr, spectr.Arrow, spectr.Uniform, spectr.Oracle} == {Spectr, Arrow, Uniform, Oracle}
