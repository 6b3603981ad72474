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
    code, text, _ = spectr("generate", "what is it", "-n", 2, "--json", "-r", "shortlist", "--shortlist", 1, *given)
    assert code == 0
    assert list(json.loads(text)["experts"].values()) == [1.0]
    options = ("--shortlist", 2, "--local", "spectr", "-k", 1, "--expert-memory", 0.5)
    code, text, _ = spectr("generate", "what is it", "-n", 2, "--json", "-r", "shortlist", *options, *given)
    assert code == 0
    assert sum(json.loads(text)["experts"].values()) == pytest.approx(1, abs=1e-3)
    assert len(json.loads(text)["experts"]) == 2
    options = ("--shortlist", 1, "--bits", 16)
    code, text, _ = spectr("generate", "what is it", "-n", 2, "--json", "-r", "shortlist", *options, *given)
    assert code == 0
    assert list(json.loads(text)["experts"].values()) == [1.0]
    code, text, notes = spectr("route", "what is it", "-r", "shortlist", "--shortlist", 1, *given)
    assert code == 0
    assert "decided once for the whole prompt" in said(notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-r", "spectr", "--shortlist", 3), "for the router shortlist, not spectr"),
        (("--bits", 16), "for the router shortlist"),
        (("-r", "shortlist", "--bits", 12), "bits=12"),
        (("--local", "arrow"), "for the router shortlist"),
        (("-r", "shortlist", "--shortlist", 1, "--local", "arrow"), "nothing to choose"),
        (("-r", "shortlist", "--shortlist", 1, "-k", 2), "nothing to choose"),
        (("-r", "shortlist", "--local", "calibrated"), "does not decide for each token"),
        (("-r", "shortlist", "--local", "arow"), "arrow"),
        (("-r", "shortlist", "--shortlist", 2, "--local", "spectr", "-k", 3), "at least top_k"),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(spectr, given, options, message):
    code, _, notes = spectr("generate", "what", *options, *given)
    assert code == 2
    assert message in said(notes)
    assert "loading" not in notes
