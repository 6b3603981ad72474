"""The index and the shortlist from the command line."""

from __future__ import annotations

import json

import pytest


def said(notes):
    return " ".join(notes.split())


def test_from_nothing_to_an_answer(spectr, given, world):
    """Each step says what comes before it; an interrupted or repeated index does no work twice."""
    code, _, notes = spectr("generate", "what is it", "-r", "shortlist", *given)
    assert code == 2
    assert "spectr library calibrate" in said(notes)
    assert "loading" not in notes
    code, _, notes = spectr("library", "index", *given)
    assert code == 2
    assert "spectr library calibrate" in said(notes)
    assert spectr("library", "calibrate", "--samples", 2, "--tokens", 4, *given)[0] == 0
    code, _, notes = spectr("generate", "what is it", "-r", "shortlist", *given)
    assert code == 2
    assert "not indexed: amber, blue, cyan" in said(notes)
    assert "spectr library index --library" in said(notes)
    _, text, _ = spectr("library", "index", *given)
    assert "indexed 3 of 3 experts" in said(text)
    _, text, notes = spectr("library", "index", *given)
    assert "all 3 experts are indexed" in text
    assert "loading" not in notes
    always = ("--set", "abstain=none")
    code, text, _ = spectr(
        "generate", "what is it", "-n", 2, "--json", "-r", "shortlist", "--set", "size=1", *always, *given
    )
    assert code == 0
    assert list(json.loads(text)["experts"].values()) == [1.0]
    options = ("--set", "size=2", "--set", "token_router=spectr", "-k", 1, "--expert-memory", 0.5)
    code, text, _ = spectr("generate", "what is it", "-n", 2, "--json", "-r", "shortlist", *options, *always, *given)
    assert code == 0
    assert sum(json.loads(text)["experts"].values()) == pytest.approx(1, abs=1e-3)
    assert len(json.loads(text)["experts"]) == 2
    options = ("--set", "size=1", "--set", "bits=16")
    code, text, _ = spectr("generate", "what is it", "-n", 2, "--json", "-r", "shortlist", *options, *always, *given)
    assert code == 0
    assert list(json.loads(text)["experts"].values()) == [1.0]
    code, text, notes = spectr("route", "what is it", "-r", "shortlist", "--set", "size=1", *always, *given)
    assert code == 0
    assert "decides once for the whole prompt" in said(notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-r", "spectr", "--set", "size=3"), "router 'spectr' has no size"),
        (("-r", "spectr", "--set", "top-q=3"), "did you mean 'top_k'"),
        (("-r", "arrow", "--set", "weights=soft"), "weights=soft expected: uniform or softmax"),
        (("-r", "shortlist", "--set", "bits=12"), "bits=12"),
        (("-r", "shortlist", "--set", "size=1", "--set", "token_router=arrow"), "leaves no choice"),
        (("-r", "shortlist", "--set", "size=1", "-k", 2), "leaves no choice"),
        (("-r", "shortlist", "--set", "token_router=calibrated"), "does not decide for each token"),
        (("-r", "shortlist", "--set", "token_router=arow"), "arrow"),
        (("-r", "shortlist", "--set", "size=2", "--set", "token_router=spectr", "-k", 3), "at least top_k"),
    ],
)
def test_a_mistake_is_reported_before_the_model_is_loaded(spectr, given, options, message):
    code, _, notes = spectr("generate", "what", *options, *given)
    assert code == 2
    assert message in said(notes)
    assert "loading" not in notes
