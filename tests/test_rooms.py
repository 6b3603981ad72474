"""The layout of the package: each room imports only from those before it; names are unique, and files are short.

Imports inside functions count. Those under ``TYPE_CHECKING`` do not: nothing runs by them.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import spectr
from spectr.cli.app import app

ROOT, HERE = Path(spectr.__file__).parent, Path(__file__).parent
BRANCHES = (ast.If, ast.For, ast.While, ast.Try, ast.IfExp, ast.comprehension)
ROOMS = (
    ("errors", "renamed", "atomic_write", "folders", "grouping", "hashing", "flops", "lazy", "registry"),
    ("spectral",),
    ("adapters",),
    ("library",),
    ("shipped",),
    ("selection", "combine", "routers"),
    ("ops",),
    ("layers",),
    ("models",),
    ("prompts",),
    ("paging",),
    ("composition",),
    ("composed_model",),
    ("tasks", "guidance", "calibration", "indexing", "choosing", "description", "checkup"),
    ("vllm", "serving"),
    ("merging", "extraction", "training", "evaluation", "plots", "benchmark", "demo"),
    ("cli", "__main__"),
)
SHARED_NAMES = {  # names that several modules have, with the reason
    "__init__": "each package has one",
    "ties": "a method's file has the method's name: among the chosen experts, and as a merge",
    "knots": "a method's file has the method's name: among the chosen experts, and as a merge",
}
PLACE = {name: number for number, room in enumerate(ROOMS) for name in room}


def imports(path: Path) -> list[tuple[str, int]]:
    """Modules of the package that a file imports, with the line."""
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "spectr":
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found.append((whole if is_module(whole) else node.module, node.lineno))
        elif isinstance(node, ast.Import):
            found.extend((name.name, node.lineno) for name in node.names if name.name.startswith("spectr."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def is_module(name: str) -> bool:
    place = ROOT.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def files() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_tests_mirror_the_package():
    """``helpers`` serves all of them, and ``benchmarks`` mirrors the folder of that name."""
    folders = {path.parent.name for path in HERE.glob("*/*.py")}
    assert folders - {"helpers", "benchmarks"} <= {path.name for path in ROOT.iterdir()}


def test_every_module_has_a_room():
    assert {path.relative_to(ROOT).with_suffix("").parts[0] for path in files()} == set(PLACE)


def test_no_two_modules_have_one_name():
    """Except a command's file, which has the name of its command."""
    commands = {command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    modules = [path for path in ROOT.rglob("*.py") if path.parent.name != "cli" or path.stem not in commands]
    counts = Counter(path.stem for path in modules)
    assert {name for name, count in counts.items() if count > 1} == set(SHARED_NAMES)


def test_files_are_short():
    places = [path for folder in (ROOT, HERE, HERE.parent / "benchmarks") for path in folder.rglob("*.py")]
    long = {str(path): lines for path in places if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert long == {}


def test_commands_hold_no_logic():
    """They read options, call the package and print results: short functions with few branches, without tensors."""
    for path in (ROOT / "cli").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [name for node in ast.walk(tree) for name in numerics(node)]
        assert not found, f"{path.name} imports {found}"
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            inside = list(ast.walk(function))
            assert sum(isinstance(node, ast.stmt) for node in inside) <= 40, f"{path.name}: {function.name} is long"
            assert sum(isinstance(node, BRANCHES) for node in inside) <= 10, f"{path.name}: {function.name} branches"


def numerics(node: ast.AST) -> set[str]:
    names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return {"torch", "numpy", "safetensors"} & {name.split(".")[0] for name in names}


def test_each_room_imports_only_from_those_before_it():
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files()
        for name, line in imports(path)
        if name != "spectr" and PLACE[name.split(".")[1]] > PLACE[path.relative_to(ROOT).with_suffix("").parts[0]]
    ]
    assert not upward, "\n".join(upward)


def test_no_modules_import_each_other_in_a_circle():
    """A package's ``__init__`` stands for the modules that it names, and is left out."""
    graph = {
        module_of(path): {name for name, _ in imports(path) if not (ROOT.parent.joinpath(*name.split("."))).is_dir()}
        for path in files()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def follow(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                follow(other, (*above, name))
            done.add(name)

    for name in sorted(graph):
        follow(name, ())
