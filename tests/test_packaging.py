"""What the two distributions of this repository carry: the code, and the shipped experts as data."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import spectr as package
from spectr.errors import DOCUMENTATION

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
ROOT = Path(__file__).parents[1]
EXPERTS = ROOT / "experts"
NOT_DATA = {"LICENSE", "README.md", "pyproject.toml", ".lock", "dist"}
checkout_only = pytest.mark.skipif(not EXPERTS.is_dir(), reason="the source distribution has no experts")


def read(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def required(extra: str) -> set[str]:
    """The distributions that an extra asks for, its own extras followed."""
    extras = read(ROOT)["project"]["optional-dependencies"]
    found = set()
    for line in extras[extra]:
        requirement = Requirement(line)
        found |= {requirement.name} if requirement.name != "spectr-lora" else set()
        for inner in requirement.extras if requirement.name == "spectr-lora" else ():
            found |= required(inner)
    return found


def test_nothing_runs_when_python_starts():
    assert list((ROOT / "src").rglob("*.pth")) == []
    assert "force-include" not in read(ROOT)["tool"]["hatch"]["build"]["targets"]["wheel"]


def test_the_package_is_typed():
    assert (Path(package.__file__).parent / "py.typed").is_file()


def test_a_checkout_installs_without_the_distribution_of_experts():
    assert "spectr-lora-experts" in required("demo")
    assert not [extra for extra in ("all", "dev") if "spectr-lora-experts" in required(extra)]


@checkout_only
def test_the_extra_demo_takes_the_experts_of_this_checkout():
    version = Version(read(EXPERTS)["project"]["version"])
    [wanted] = [
        requirement
        for line in read(ROOT)["project"]["optional-dependencies"]["demo"]
        if (requirement := Requirement(line)).name == read(EXPERTS)["project"]["name"]
    ]
    assert version in wanted.specifier
    assert version.release[:2] == Version(read(ROOT)["project"]["version"]).release[:2]


@checkout_only
def test_the_distribution_of_experts_carries_the_whole_library():
    patterns = [pattern.strip("/") for pattern in read(EXPERTS)["tool"]["hatch"]["build"]["include"]]
    names = {path.name for path in EXPERTS.iterdir()} - NOT_DATA
    assert {name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)} == set()


@checkout_only
def test_both_distributions_have_the_same_licence():
    assert (EXPERTS / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_addresses_and_the_version_are_the_same_everywhere():
    project = read(ROOT)["project"]
    home, site, version = project["urls"]["Source"], project["urls"]["Documentation"], project["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert site == DOCUMENTATION
    assert f'repository = "{home}"' in (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert all(
        line in citation.splitlines() for line in (f"version: {version}", f"repository-code: {home}", f"url: {site}")
    )


@checkout_only
def test_both_distributions_and_the_image_name_the_same_version_and_home():
    project, experts = read(ROOT)["project"], read(EXPERTS)["project"]
    assert experts["urls"]["Homepage"] == project["urls"]["Homepage"]
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f'"spectr-lora[serve,demo]=={project["version"]}"' in image
