"""Examples run as they are pasted: the Python of the docs, and what docstrings show.

A tiny model and tiny experts stand in for real ones, so that this takes seconds. The notebooks of the docs show real
output. A block after the comment ``<!-- not run: REASON -->`` is left out.
"""

from __future__ import annotations

import doctest
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import spectr
import spectr.models
from text_model import make_model, make_tokenizer, save_experts

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)
PAGES = {
    page.relative_to(ROOT).as_posix(): blocks
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if "generated" not in page.parts and (blocks := list(BLOCK.finditer(page.read_text(encoding="utf-8"))))
}
RUN = [page for page, blocks in PAGES.items() if not all(block["reason"] for block in blocks)]
NAMES = ("agnews", "cola", "sst2")
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "src").rglob("*.py"))
    if "    >>> " in path.read_text(encoding="utf-8")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders that the examples name: adapters, and a calibrated library of them."""
    root = tmp_path_factory.mktemp("examples")
    save_experts(root / "adapters", NAMES)
    save_experts(root / "my-experts", NAMES)
    library = spectr.ExpertLibrary.open(root / "my-experts")
    calibration = spectr.calibrate(make_model(), library, make_tokenizer(), samples=2, tokens=8, null=4)
    calibration.save(root / "my-experts")
    spectr.build_index(make_model(), spectr.ExpertLibrary.open(root / "my-experts"), root / "my-experts")
    return root


@pytest.fixture
def space(made, monkeypatch):
    """Names that fragments use, and what the examples load, made small."""
    monkeypatch.chdir(made)
    monkeypatch.setattr("spectr.shipped.shipped_experts", lambda: made / "my-experts")
    monkeypatch.setattr(spectr.models, "load_model", lambda *_, **__: (make_model(), make_tokenizer()))
    whole = spectr.calibrate
    monkeypatch.setattr(spectr, "calibrate", lambda *args, **_: whole(*args, samples=2, tokens=8, null=0))
    model, tokenizer = spectr.models.load_model()
    inputs = spectr.models.encode_batch(tokenizer, ["is the film good or bad"])
    library = spectr.ExpertLibrary.open("my-experts")
    return {"spectr": spectr, "model": model, "tokenizer": tokenizer, "library": library, "inputs": inputs}


def run(page: str, space: dict[str, Any]) -> None:
    """The blocks of a page, one after the other. One that composes anew does so with the base model."""
    blocks = [block["code"] for block in PAGES[page] if not block["reason"]]
    whole = "\n".join(blocks)
    if "spectr.compose(" not in whole and re.search(r"\brouted\.|spectr\.trace\(", whole):
        space["routed"] = spectr.compose(space["model"], space["library"], spectr.Calibrated())
        space["verdict"] = space["decision"] = space["routed"].prompt.decide(**space["inputs"])
    for number, code in enumerate(blocks, start=1):
        layers = space["model"].modules() if "spectr.compose(" in code else ()
        if any(isinstance(layer, spectr.RoutedLinear) for layer in layers):
            space["routed"].remove()
        exec(compile(code, f"{page}, block {number}", "exec"), space)  # our own pages


@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_runs(space, page):
    run(page, space)


def test_blocks_that_are_left_out_are_few_and_have_a_reason():
    blocks = [block for page in PAGES.values() for block in page]
    left_out = [block["reason"] for block in blocks if block["reason"]]
    assert all(len(reason.split()) > 2 for reason in left_out)
    assert len(left_out) < len(blocks) / 2


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_in_docstrings_show_what_comes_out(module):
    found = doctest.testmod(import_module(module), extraglobs={"spectr": spectr, "torch": torch})
    assert found.attempted
    assert not found.failed


def _spectr_commands(page: Path) -> list[str]:
    """The lines of a page's console blocks that call ``spectr``, without prompts and comments."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("spectr ")]


HOWTOS = [page for page in sorted((ROOT / "docs" / "howto").glob("*.md")) if _spectr_commands(page)]


@pytest.mark.parametrize("page", HOWTOS, ids=lambda page: page.stem)
def test_the_commands_of_a_page_parse(page, monkeypatch):
    """Their options exist, the required ones are given, and values have the right type."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    from command_pages import commands

    known = dict(commands())
    for line in _spectr_commands(page):
        words = shlex.split(line, comments=True)
        name = max((name for name in known if words[: len(name.split())] == name.split()), key=len)
        known[name].make_context(name, words[len(name.split()) :])  # raises if it cannot be parsed
