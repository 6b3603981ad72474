"""What commands show where the base model answered, as no expert stands out."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import pytest

from abstaining import COMMON, FITTING

SAID = "no expert stands out (p = 0.40): the base model answered"


@pytest.fixture
def words(monkeypatch, given):
    """Options of a router that abstains, by evidence that another package adds."""
    point = EntryPoint(name="foretold", value="abstaining:Foretold", group="spectr.evidence")
    monkeypatch.setattr("spectr.registry.entry_points", lambda group: [point] if group == point.group else [])
    settings = ("evidence=foretold", "use=hold", "router=spectr", "router.top_k=1", "abstain=0.1")
    return ("-r", "policy", *(word for setting in settings for word in ("--set", setting)), *given)


def test_generate(spectr, words):
    code, _, notes = spectr("generate", COMMON[0], "-n", 3, *words)
    assert code == 0
    assert SAID in notes
    assert "experts used" not in notes
    _, _, notes = spectr("generate", FITTING[0], "-n", 3, *words)
    assert SAID not in notes
    assert "experts used" in notes


def test_generate_as_json(spectr, words):
    found = json.loads(spectr("generate", COMMON[0], "-n", 3, "--json", *words)[1])
    assert found["experts"] == {"amber": 0.0, "blue": 0.0, "cyan": 0.0}
    assert found["p"] == 0.4
    found = json.loads(spectr("generate", FITTING[0], "-n", 3, "--json", *words)[1])
    assert sum(found["experts"].values()) == pytest.approx(1)
    assert found["p"] == 0.01
    found = json.loads(spectr("generate", COMMON[0], "-n", 3, "--json", *words, "-a", "blue")[1])
    assert found["experts"] == {"blue": 1.0}


def test_an_expert_for_every_prompt(spectr, words):
    always = tuple("abstain=none" if word == "abstain=0.1" else word for word in words)
    found = json.loads(spectr("generate", COMMON[0], "-n", 3, "--json", *always)[1])
    assert sum(found["experts"].values()) == pytest.approx(1)


def test_chat(spectr, words, monkeypatch):
    lines = iter([COMMON[0], "/new", FITTING[0], "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    code, _, notes = spectr("chat", "-n", 2, *words)
    assert code == 0
    assert notes.count(SAID) == 1
    assert notes.count("100%") == 1


def test_route_and_its_pictures(spectr, words, tmp_path):
    html, png = tmp_path / "page.html", tmp_path / "map.png"
    code, text, _ = spectr("route", COMMON[0], "--html", html, "--png", png, *words)
    assert code == 0
    assert SAID in text
    assert "decides once for the whole prompt" not in text
    assert SAID in html.read_text(encoding="utf-8")
    assert png.stat().st_size > 1000
    found = json.loads(spectr("route", COMMON[0], "--json", *words)[1])
    assert set(found["shares"].values()) == {0.0}
    assert found["p"] == 0.4
    assert SAID not in spectr("route", FITTING[0], *words)[1]


def test_a_number_that_the_calibration_cannot_serve_is_refused_before_the_model_is_loaded(spectr, given):
    code, _, notes = spectr("generate", "what", "-r", "calibrated", "--set", "abstain=1.5", *given)
    assert code == 2
    assert "abstain=1.5" in notes
    assert "loading" not in notes
