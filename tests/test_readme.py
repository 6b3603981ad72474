"""The README's Python runs as it is pasted, here with a tiny model and experts of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import spectr
import spectr.models
from text_model import make_model, make_tokenizer, save_experts

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """What the example loads, made small."""
    save_experts(tmp_path / "experts", ("agnews", "sst2", "qqp"))
    monkeypatch.setattr("spectr.shipped.shipped_experts", lambda: tmp_path / "experts")
    monkeypatch.setattr(spectr.models, "load_model", lambda: (make_model(), make_tokenizer()))
    library = spectr.ExpertLibrary.open(tmp_path / "experts")
    spectr.calibrate(make_model(), library, make_tokenizer(), samples=2, tokens=8, null=0).save(tmp_path / "experts")


def test_the_example_runs(tiny, capsys):
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    space: dict = {}
    exec(code, space)  # our own README
    assert space["routed"].experts == ("agnews", "sst2")
    _, shares = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert sum(space["trace"].shares().values()) == pytest.approx(1)
    assert "sst2" in shares
