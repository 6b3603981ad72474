"""Fixtures of all tests, and what happens around each."""

import gc
import io
import os
import sys
from pathlib import Path

import pytest
from jaxtyping import config

from adapters_on_disk import tree, write_adapter
from spectr import calibration
from spectr.library import LibraryStore
from spectr.models.samples import null_samples
from text_model import save_experts, save_model
from written_once import null_once

# Where the numerics have their own tests, and one file that composes models. Elsewhere models call them by the
# thousand, and the checks take longer than the tests themselves.
CHECKED_IN = (
    "combine/",
    "composition/test_compose.py",
    "extraction/",
    "layers/test_trace.py",
    "merging/",
    "ops/",
    "routers/",
    "spectral/",
)


def pytest_collection_finish() -> None:
    """Have the garbage collector skip what the imports made: half a million objects, 0.3 s each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Undo it at the end: Triton's binding prints a page about objects that nobody collected."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    """Shapes are checked, or not, from a test's first fixture on; ordinary prompts are written once, or each time."""
    place = item.path.relative_to(Path(__file__).parents[1]).as_posix()
    config.update("jaxtyping_disable", not place.startswith(CHECKED_IN))
    calibration.null_samples = null_samples if place.startswith("routers/calibrated/") else null_once


@pytest.fixture
def no_sync(monkeypatch) -> None:
    """Nothing waits for the disk: no test cuts the power, and a kill loses nothing that the kernel has."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A valid adapter folder, written by hand."""
    return write_adapter(tmp_path / "sources" / "adapter", seed=1)


@pytest.fixture
def other_adapter(tmp_path) -> Path:
    """Another one, with other weights."""
    return write_adapter(tmp_path / "sources" / "other", seed=2)


@pytest.fixture
def library(tmp_path, adapter, other_adapter) -> LibraryStore:
    """A library on disk of two experts, 'law' and 'sql'."""
    store = LibraryStore(tmp_path / "library")
    store.add("sql", adapter)
    store.add("law", other_adapter)
    return store


@pytest.fixture
def unchanged(library):
    """A check that every file of the library is as it was when the test began."""
    before = tree(library.root)
    return lambda: tree(library.root) == before


@pytest.fixture
def spectr(monkeypatch, capsys):
    """Run a command line; gives its exit code, standard output and standard error."""

    from spectr.cli import main

    def call(*words, stdin=None):
        monkeypatch.setattr(sys, "argv", ["spectr", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        text = capsys.readouterr()
        return code, text.out, text.err

    return call


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model and three experts, as the command line is given them."""
    root = tmp_path_factory.mktemp("world")
    save_model(root / "model")
    save_experts(root / "adapters", ("amber", "blue", "cyan"))
    return root


@pytest.fixture
def given(world):
    """The options that name them."""
    return ("--model", world / "model", "--library", world / "adapters", "--dtype", "float32")
