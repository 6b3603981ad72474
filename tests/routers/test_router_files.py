"""A method's file holds the method: scores alone, facts that are declared, and needs that one function checks."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import routers_alone
import spectr
from composed_parts import session_of
from models import peft_library, tiny_llama
from routers_alone import LIBRARIES, METHODS
from spectr import compose
from spectr.combine import Combination
from spectr.errors import CompositionError
from spectr.library import needs
from spectr.routers import PromptRouter, Router, first_lack, router as faces
from spectr.routers.registries import EVIDENCE, ROUTERS, USES
from spectr.routers.version1 import adapted_maker
from spectr.selection import TopK
from spectr.spectral import Share, segment_norms
from spectr.vllm import worker_state

SRC = Path(spectr.__file__).parent
TREES = {path.relative_to(SRC).as_posix(): ast.parse(path.read_text()) for path in sorted(SRC.rglob("*.py"))}
KINDS = {make for name in ROUTERS.entries if isinstance(make := ROUTERS.load(name), type)}
FACES = [kind for kind in vars(faces).values() if isinstance(kind, type) and issubclass(kind, Router)] + [PromptRouter]
PARTS = [make for names in (EVIDENCE, USES) for name in names.entries if isinstance(make := names.load(name), type)]
WITH_FACTS = (*KINDS, *FACES, *PARTS, TopK, Combination)
FACTS = {name for kind in WITH_FACTS for name in (*vars(kind), *kind.__annotations__) if not name.startswith("_")}
FACTS -= {"bias", "prepare"}  # of linear layers, and of the first protocol
FACTS |= {"calibrated", "gated", "guided", "shares_A", "by_norms", "informs", "resident", "lacking", "k", "density"}


def calls(tree, *functions):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            yield node


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize("router", METHODS, ids=str)
def test_a_router_alone_scores_as_the_reference(router, kind):
    routers_alone.check(router, kind)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_lag_lists_among_the_allowed_and_the_oracle_keeps_its_expert(kind):
    routers_alone.check_lag_among_the_allowed(kind)
    routers_alone.check_the_oracle(kind)


def test_routers_do_that_without_layers_and_kernels():
    done = subprocess.run([sys.executable, routers_alone.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_two_files_have_the_same_scores():
    bodies = {}
    for file, tree in TREES.items():
        if file.startswith("routers/"):
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and node.name == "scores" and len(node.body) > 1:
                    bodies.setdefault(ast.dump(ast.Module(node.body[1:], [])), []).append(file)
    assert [files for files in bodies.values() if len(files) > 1] == []
    alone = [kind for kind in KINDS if not issubclass(kind, PromptRouter)]
    assert sum(map(len, bodies.values())) == len(alone) + 3  # a delegate's, GLIDER's zeros, and the first protocol's


def test_nobody_asks_a_router_what_it_is_by_the_name_of_an_attribute():
    found = [
        f"{file}:{node.lineno} {ast.unparse(node)}"
        for file, tree in TREES.items()
        for node in calls(tree, "getattr", "hasattr")
        if isinstance(node.args[1], ast.Constant) and node.args[1].value in FACTS
    ]
    assert found == []


def test_nobody_asks_which_router_it_is():
    names = {kind.__name__ for kind in KINDS}
    found = [
        f"{file}:{node.lineno} {ast.unparse(node)}"
        for file, tree in TREES.items()
        if file != "routers/registries.py"
        for node in calls(tree, "isinstance", "issubclass")
        if names & {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
    ]
    assert found == []


def test_nobody_compares_levels():
    found = [
        f"{file}:{node.lineno} {ast.unparse(node)}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        if isinstance(side, ast.Attribute) and side.attr == "level"
    ]
    assert found == []


@dataclass(frozen=True)
class Never(needs.Need):
    lacking = "what nobody has"

    def check(self, library, names):
        raise CompositionError(f"never enough: {', '.join(names)} of {len(library)}")


@dataclass(frozen=True, kw_only=True)
class Demanding(spectr.Spectr):
    @property
    def needs(self):
        return (Never(),)


def test_each_entrance_asks_the_same_of_a_library(tmp_path, monkeypatch):
    from spectr.cli.options import Routing

    model, router = tiny_llama(), Demanding(top_k=1)
    library = peft_library(model, tmp_path / "experts", {"ants": 2, "bees": 2})
    lack = first_lack(router, library, library.names)
    assert lack is not None
    assert lack[0].lacking == "what nobody has"
    monkeypatch.setitem(ROUTERS.entries, "spectr", f"{__name__}:Demanding")

    def in_vllm():
        return session_of(tmp_path / "others", ("ants", "bees"))

    def on_the_command_line():
        return Routing(library=tmp_path / "experts", router="spectr").experts()

    for enter in (lambda: compose(model, library, router), in_vllm, on_the_command_line):
        with pytest.raises(CompositionError, match="never enough: ants, bees of 2"):
            enter()
    assert worker_state.check_needs is faces.check_needs


@dataclass(frozen=True, kw_only=True)
class Old:
    """A router as it was written for the first protocol."""

    top_k: int = 2

    def prepare(self, aligned):
        from spectr.spectral import Prepared

        return Prepared.spectral(aligned)

    def scores(self, x_TI, norms_TE, prototypes_EI):
        return -norms_TE


class OldForPrompts(Old):
    level = "prompt"


@dataclass(frozen=True, kw_only=True)
class OldSubclass(Router):
    """The first protocol's interface, whose methods had other arguments, could be inherited from."""

    top_k: int = 2
    prepare = Old.prepare
    scores = Old.scores


@dataclass(frozen=True, kw_only=True)
class OldShortlist(OldSubclass, spectr.routers.ShortlistRouter):
    candidates = prepare = Old.prepare


@dataclass(frozen=True, kw_only=True)
class New(Router):
    top_k: int = 2

    @property
    def selection(self):
        return spectr.selection.TopK(k=self.top_k)

    def init_expert(self, expert, side):
        return Share.spectral(expert.aligned)

    def scores(self, state, x_TI, h_TP, allowed_TE):
        return -segment_norms(h_TP, state)


class Prepares(New):
    def prepare(self, aligned):
        raise AssertionError("it is the router's own business")


def test_a_router_of_the_first_protocol_is_adapted_or_refused_by_name(tmp_path):
    library = peft_library(tiny_llama(), tmp_path / "experts", {"ants": 2, "bees": 2, "cats": 2})
    ids, outs = torch.arange(6)[None], []
    for router in (New(), Old(), OldSubclass(), adapted_maker(OldSubclass)(), Prepares(), adapted_maker(Prepares)()):
        model = tiny_llama()
        compose(model, library, router)
        outs.append(model(ids).logits)
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    with pytest.raises(CompositionError, match=r"OldShortlist\(.*first protocol of routers, with candidates"):
        compose(tiny_llama(), library, OldShortlist())
    with pytest.raises(CompositionError, match=r"OldForPrompts\(.*first protocol of routers, with level"):
        compose(tiny_llama(), library, OldForPrompts())
