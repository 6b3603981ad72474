"""The documentation site: it builds without a warning, and its reference has what the code has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import spectr

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCE = Path(spectr.__file__).parent
# Packages whose ``__all__`` is for the package itself, and vLLM's, which is imported inside the engine.
NOT_PUBLIC = {"spectr.evaluation.experiments", "spectr.routers.evidence", "spectr.vllm"}


@pytest.fixture(scope="module", autouse=True)
def extensions():
    sys.path.insert(0, str(DOCS / "_extensions"))
    yield
    sys.path.remove(str(DOCS / "_extensions"))


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def test_it_builds_without_a_warning(tmp_path):
    """As ``make docs`` does, but without the notebooks' code."""
    options = ["-W", "--keep-going", "-q", "-D", "nb_execution_mode=off", "-d", str(tmp_path / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "index.html").is_file()


def test_every_public_name_is_described():
    from python_pages import MODULES, public_names, python_pages

    places = [path.parent for path in SOURCE.rglob("__init__.py") if "__all__" in path.read_text(encoding="utf-8")]
    packages = {".".join(("spectr", *place.relative_to(SOURCE).parts)) for place in places} - {"spectr"}
    assert packages - set(MODULES) == NOT_PUBLIC
    pages = python_pages()
    for module in MODULES:
        page = pages[f"python/{module}.md"]
        assert not [name for name in public_names(module) if f"## {name}" not in page and f"`{name}` is" not in page]
    assert not [name for name in spectr.__all__ if f"`spectr.{name}`" not in pages["python/index.md"]]


def test_every_command_and_option_is_described():
    from command_pages import command_page, commands

    page = command_page()
    sections = dict(re.findall(r"^## (spectr[a-z -]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    found = dict(commands())
    assert list(sections) == list(found)
    assert len(found) > 20
    for name, command in found.items():
        shown = [parameter for parameter in command.params if not parameter.hidden]
        longest = [max(parameter.opts, key=len) for parameter in shown if parameter.param_type_name == "option"]
        assert not [option for option in longest if option not in sections[name]], name


def test_every_router_setting_is_described():
    from router_pages import documented, router_page

    from spectr.routers.registries import ROUTERS
    from spectr.routers.setting_texts import options_of

    page = router_page()
    assert not [name for name in ROUTERS.entries if f"### `{name}`" not in page]
    assert not [name for name in ROUTERS.entries for option in options_of(name) if f"| `{option}` |" not in page]
    assert "| `modules` | names, separated by commas | `empty` |" in page
    assert documented("A.\n\nAttributes:\n    k: ``None``:\n        no one | :class:`a.B`.\n\nSource: x") == {
        "k": "`None`: no one \\| `a.B`."
    }


def test_every_setting_has_a_text():
    from router_pages import router_page

    assert not re.findall(r"^\| `\w+` \|.*\|  \|$", router_page(), re.MULTILINE)


def test_every_environment_variable_is_described():
    files = [path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "Makefile"]
    found = {name for path in files for name in re.findall(r"\bSPECTR_[A-Z]+(?:_[A-Z]+)*\b", path.read_text("utf-8"))}
    assert found == set(re.findall(r"`(SPECTR_\w+)`", text_of("reference/environment.md")))


def test_names_in_docstrings_that_do_not_exist_are_found():
    from code_names import described, exists

    assert exists("spectr.routers.router.Lengths")
    assert exists("spectr.layers.weight_reads.WeightReads.outside")
    assert not exists("spectr.routers.router.Longest")
    assert not exists("spectr.nowhere.Lengths")
    assert described("spectr.compose") == "spectr.composition.compose"


def _fragments(heading: str) -> list[str]:
    """The fixed parts of a message that a heading quotes."""
    return [part.strip(" '") for quoted in re.findall(r"`([^`]+)`", heading) for part in quoted.split("…")]


def test_every_error_class_has_an_entry_with_cause_and_cure():
    from python_pages import public_names

    page = text_of("howto/troubleshooting.md")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(public_names("spectr.errors"))
    for name, section in sections.items():
        entries = section.split("\n### ")[1:]
        assert entries, name
        assert all("**Cause.**" in entry and "**Fix.**" in entry for entry in entries), name


def test_the_messages_that_are_explained_exist():
    headings = re.findall(r"^### (.*)$", text_of("howto/troubleshooting.md"), re.MULTILINE)
    code = "\n".join(path.read_text("utf-8") for path in SOURCE.rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # texts over several lines
    code = code.replace("{CONFIG_FILE}", "adapter_config.json")
    missing = [part for heading in headings for part in _fragments(heading) if len(part) > 8 and part not in code]
    assert not missing


def test_every_error_code_of_the_api_is_described():
    source = "\n".join(path.read_text("utf-8") for path in (SOURCE / "serving").rglob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', source)) | {"engine_error", "invalid_request"}
    page = text_of("reference/http.md")
    assert codes == set(re.findall(r"^\| \d{3} \| `(\w+)`", page, re.MULTILINE))
    statuses = dict(re.findall(r'code="(\w+)",[^)]*?status=(\d+)', source))
    assert all(f"| {status} | `{code}` |" in page for code, status in statuses.items())


def test_every_metric_is_described():
    from spectr.serving.metrics import Metrics

    page = text_of("reference/http.md")
    assert not [metric.name for metric in Metrics().registry.collect() if metric.name not in page]


def test_the_pages_that_messages_name_exist():
    code = "\n".join(path.read_text("utf-8") for path in SOURCE.rglob("*.py"))
    named = set(re.findall(r"\bpage\(['\"]([a-z/-]+)['\"]\)", code))
    assert len(named) > 2
    assert not [name for name in named if not (DOCS / f"{name}.md").is_file()]
