"""What another package adds by entry points alone, as CONTRIBUTING describes it, from the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import httpx
import pytest

POINTS = {
    "spectr.routers": "modest = theirs:Modest",
    "spectr.evidence": "short = theirs:Short",
    "spectr.combinations": "louder = theirs:louder",
    "spectr.merge_methods": "soup = theirs:Soup",
    "spectr.experiments": "count = theirs:count",
    "spectr.engines": "plain = theirs:Launcher",
}


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A folder with the package and its metadata, as pip leaves it; on this process' path and on that of others."""
    site = tmp_path / "site"
    facts = site / "theirs-1.0.dist-info"
    facts.mkdir(parents=True)
    shutil.copy(Path(__file__).parents[1] / "helpers" / "theirs.py", site)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("".join(f"[{group}]\n{point}\n" for group, point in POINTS.items()))
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    return site


ROUTED = ("-r", "modest", "--set", "top_k=1", "--combine", "louder:gain=2")


def test_an_engine_serves_a_request_with_a_router_and_a_combination(installed, start):
    address, said, process = start("--engine", "plain", *ROUTED, "--except", "cyan")
    assert "layers routed among amber, blue, by modest" in said
    asked = {"model": "spectr/blue", "prompt": "what is red", "return_routing": True}
    answer = httpx.post(f"{address}/v1/completions", json=asked, timeout=60).json()
    assert answer["model"] == "spectr/blue"
    [choice] = answer["choices"]
    assert choice["routing"] == {"experts": ["blue"], "tokens": [[[0, 1.0]]]}
    answer = httpx.post(f"{address}/v1/completions", json={**asked, "model": "spectr"}, timeout=60).json()
    assert answer["choices"][0]["routing"]["experts"] == ["amber", "blue"]
    assert httpx.post(f"{address}/v1/completions", json={**asked, "model": "spectr/cyan"}).status_code == 404
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130


def test_a_router_and_a_combination_answer(installed, spectr, given):
    code, text, notes = spectr("generate", "what is red", "-n", 1, "--json", *ROUTED, *given)
    assert code == 0, notes
    assert json.loads(text)["router"] == "Modest(top_k=1, combine='louder:gain=2')"
    code, _, notes = spectr("generate", "what", "-r", "modest", "--combine", "louder:gian=2", *given)
    assert code == 2
    assert "combine='louder:gian=2'\n  expected: louder:gain=NUMBER\n" in notes


@pytest.mark.parametrize(("length", "expert"), [(100, "amber"), (0, "cyan")])
def test_evidence_decides(installed, spectr, given, length, expert):
    settings = ("evidence=short", f"evidence.length={length}", "use=hold", "router=spectr", "router.top_k=1")
    policy = ("-r", "policy", *(part for setting in settings for part in ("--set", setting)))
    code, text, notes = spectr("generate", "what is red", "-n", 1, "--json", *policy, *given)
    assert code == 0, notes
    answer = json.loads(text)
    assert f"Short(length={length})" in answer["router"]
    assert list(answer["experts"]) == [expert]


def test_an_experiment_and_a_way_to_merge_run(installed, spectr, given, world, tmp_path):
    task = tmp_path / "blue.yaml"
    rows = [{"thing": "sky", "label": n % 2} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task.write_text(f"name: blue\nversion: 1\nprompt: what\nchoices: [green, blue]\ntest: {tmp_path / 'rows.jsonl'}\n")
    code, _, notes = spectr("evaluate", "count", "--task", task, "-o", tmp_path / "out", *given)
    assert code == 0, notes
    assert json.loads((tmp_path / "out" / "count.json").read_text())["rows"] == [["experts", 3]]
    library = ("--library", world / "adapters")
    code, _, notes = spectr("merge", "amber", "blue", "--method", "soup", "--out", tmp_path / "merged", *library)
    assert code == 0, notes
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()
