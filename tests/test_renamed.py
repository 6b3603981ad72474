"""Old names of modules resolve to the modules themselves, with a warning."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import spectr
from spectr.renamed import MODULES, new_name

ROOT = Path(spectr.__file__).parent.parent


@pytest.mark.parametrize("old", sorted(set(MODULES) - {name for name in MODULES if name.startswith("spectr.vllm")}))
def test_an_old_name_is_the_module_itself(old):
    with pytest.warns(DeprecationWarning, match=f"the module {old} is now {MODULES[old]}"):
        found = importlib.import_module(old)
    assert found is importlib.import_module(MODULES[old])
    assert found.__spec__.name == MODULES[old]


def test_modules_of_a_package_that_has_another_name():
    assert new_name("spectr.composed.load") == "spectr.composed_model.load"
    with pytest.warns(DeprecationWarning, match="is now spectr.composed_model.load"):
        from spectr.composed.load import load_composed
    assert load_composed is spectr.load_composed


def is_there(name):
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or place.is_dir()


def test_no_old_name_has_a_file_and_every_new_one_has():
    assert [name for name in MODULES if is_there(name)] == []
    assert [name for name in MODULES.values() if not is_there(name)] == []


def test_every_module_of_0_1_has_a_name_today():
    lines = (Path(__file__).parent / "helpers" / "modules_of_0_1.txt").read_text(encoding="utf-8").splitlines()
    before = {
        f"{package}.{name}" for package, _, names in (line.partition(": ") for line in lines) for name in names.split()
    }
    lost = {name for name in before if not is_there(name) and not is_there(new_name(name) or "spectr.lost")}
    assert lost == {"spectr.paging.simulate", "spectr.paging.workload"}  # in benchmarks/ of the repository


def test_the_table_in_the_docs_is_complete():
    docs = ROOT.parent / "docs" / "reference" / "old-names.md"
    if not docs.is_file():
        pytest.skip("an installed package comes without docs")
    text = docs.read_text(encoding="utf-8")
    assert all(f"| `{old}` | `{new}` |" in text for old, new in MODULES.items())


def renamed_attributes():
    """Module, old and new name of all attributes that modules offer under an old name."""
    for path in sorted((ROOT / "spectr").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "renamed" and isinstance(node.value, ast.Dict):
                for old, new in ast.literal_eval(node.value).items():
                    yield module, old, new


@pytest.mark.parametrize(("module", "old", "new"), list(renamed_attributes()))
def test_an_old_attribute_is_the_new_one(module, old, new):
    home = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {module}.{new}"):
        assert getattr(home, old) is getattr(home, new)
    docs = ROOT.parent / "docs" / "reference" / "old-names.md"
    assert not docs.is_file() or f"{old}`" in docs.read_text(encoding="utf-8")
