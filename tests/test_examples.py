"""Examples run as they are pasted: the Python of the docs, and what docstrings show.

A tiny model and tiny experts stand in for real ones, so that this takes seconds. The notebooks of the docs show real
output. A block after the comment ``<!-- not run: REASON -->`` is left out.
"""

from __future__ import annotations

import doctest
import re
import shlex
import textwrap
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


def _commands(text: str) -> list[str]:
    """The commands of a page's console blocks and of examples in help texts, without prompts and output."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    blocks += [f"$ {shown}" for shown in re.findall(r"\[dim\](.*?)\[/\]", text)]
    found: list[str] = []
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append(line.removeprefix("$ "))
            elif found and (
                line.startswith("> ") or found[-1].count('"') % 2
            ):  # a loop, or an argument of several lines
                found[-1] += "\n" + line.removeprefix("> ")
    return [part.strip() for line in found for part in re.split(r"\n(?=  |done)| && |; do ", line)]


def _texts(*patterns: str) -> dict[str, str]:
    files = [file for pattern in patterns for file in sorted(ROOT.glob(pattern)) if "generated" not in file.parts]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


SHOWN = _texts("*.md", "docs/**/*.md", "experts/*.md", "src/spectr/cli/*.py")
WITH_COMMANDS = [name for name, text in SHOWN.items() if any(line.startswith("spectr ") for line in _commands(text))]


@pytest.fixture
def known(monkeypatch):
    """The commands by name."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    from command_pages import commands

    return dict(commands())


def _split(line: str, known: dict[str, Any]) -> tuple[str, list[str]]:
    """The name of a command, and its arguments."""
    words = shlex.split(re.sub(r"\s#.*", "", line))
    name = max((name for name in known if words[: len(name.split())] == name.split()), key=len, default="")
    return name, words[len(name.split()) :]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_parse(page, known):
    """Their options exist, the required ones are given, and values have the right type."""
    for line in _commands(SHOWN[page]):
        if line.startswith("spectr "):
            name, arguments = _split(line, known)
            known[name].make_context(name, arguments)  # raises if it cannot be parsed


def test_options_in_the_text_exist(known):
    """Of commands between backticks, which may lack arguments."""
    unknown = []
    for page, text in SHOWN.items():
        for line in re.findall(r"`(spectr [^`\n]+)`", text) if page.endswith(".md") else ():
            name, arguments = _split(line, known)
            parameters = known[name].params if name else ()
            options = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
            given = arguments[: arguments.index("--")] if "--" in arguments else arguments
            unknown += [f"{page}: {line}" for word in given if name and word[:1] == "-" and word not in options]
    assert not unknown


def test_benchmarks_that_are_shown_exist_with_their_options():
    missing = []
    for page, text in SHOWN.items():
        for name, given in re.findall(r"python benchmarks/(\w+)\.py([^`\n#]*)", text):
            file = ROOT / "benchmarks" / f"{name}.py"
            source = file.read_text(encoding="utf-8") if file.is_file() else ""
            own = re.split(r" -- ", given)[0]
            missing += [f"{page}: {name} {word}" for word in re.findall(r"--[\w-]+", own) if f'"{word}"' not in source]
            missing += [f"{page}: {name}"] if not source else []
    assert not missing


def test_the_classes_that_contributors_are_shown_work(space):
    """The router and the evidence of CONTRIBUTING, which leaves out the imports; the launcher is in ``theirs.py``."""
    space["torch"] = torch
    imports = """
    from dataclasses import dataclass
    from spectr.routers import Evidence, Found, HoldWeights, Router
    from spectr.selection import TopK
    from spectr.spectral import Share, segment_norms
    """
    router, evidence, _ = (block["code"] for block in BLOCK.finditer(SHOWN["CONTRIBUTING.md"]))
    exec(textwrap.dedent(imports) + router + evidence, space)  # our own page
    parts = {"evidence": space["Mentions"](), "use": space["HoldWeights"](), "router": spectr.Spectr(top_k=2)}
    for made in (space["Modest"](top_k=2), spectr.PromptPolicy(**parts)):
        routed = spectr.compose(space["model"], space["library"], made)
        assert space["model"](**space["inputs"]).logits.isfinite().all()
        routed.remove()


def test_the_files_that_are_shown_can_be_read(space, tmp_path):
    """Policies, a task and descriptions, by the functions that read a user's; and the settings of a vLLM engine."""
    from spectr.composed_model.quantization_config import Settings
    from spectr.library.description_file import read_descriptions
    from spectr.serving.catalog import read_policy
    from spectr.tasks import Task

    shown = [block for text in SHOWN.values() for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    for number, text in enumerate(shown):
        readers = {"keys:": read_policy, "name:": Task.load}
        reader = readers.get(text.split()[0], lambda path: read_descriptions(path.parent))
        path = tmp_path / str(number) / "descriptions.yaml"
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        assert reader(path)
    assert len(shown) > 3
    run("docs/howto/vllm.md", space)
    assert Settings.of(space["hf_overrides"]["quantization_config"]).router == {"name": "spectr", "top_k": 4}
