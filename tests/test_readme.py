"""The README's Python runs as it is pasted, here with a tiny model and its own experts; its links are absolute."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

import spectr
import spectr.models
from text_model import make_model, make_tokenizer, save_experts

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPOSITORY = re.compile(
    r"https://(?:github\.com/spectr-lora/spectr/blob|raw\.githubusercontent\.com/spectr-lora/spectr)/main/(\S+)"
)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """What the example loads, made small."""
    save_experts(tmp_path, ("sql", "law"))
    from_adapters = spectr.ExpertLibrary.from_adapters
    monkeypatch.setattr(
        spectr.ExpertLibrary, "from_adapters", lambda given: from_adapters({name: tmp_path / name for name in given})
    )
    monkeypatch.setattr(spectr.models, "load_model", lambda name: (make_model(), make_tokenizer()))
    monkeypatch.setattr(spectr, "calibrate", partial(spectr.calibrate, samples=2, tokens=8, null=0))


def test_the_example_runs(tiny, capsys):
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    space: dict = {}
    exec(code, space)  # our own README
    assert space["routed"].experts == ("law", "sql")
    assert capsys.readouterr().out.startswith("['")
    assert space["routed"].remove() is space["model"]


def test_it_fits_on_one_screen():
    assert len(README.splitlines()) <= 80


def test_links_are_absolute_and_lead_to_files():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert [link for link in links if not link.startswith("https://")] == []
    inside = [found[1] for link in links if (found := REPOSITORY.match(link))]
    assert inside
    assert [path for path in inside if not (ROOT / path).is_file()] == []
