"""Before anything else: no network, one thread, and shapes and types of the numerics checked while the tests run."""

import gc
import io
import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "SPECTR_KERNELS", "rows:16,tiles,torch+tiles,torch+sums"
)  # timing would decide otherwise each time

from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from jaxtyping import config, install_import_hook

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported by whatever test is first

# The modules whose signatures carry shapes. Elsewhere a wrong type has to reach our own error, not the checker's; and
# Triton's interpreter has to find its kernels as they are written.
CHECKED = (
    "spectr.combine",
    "spectr.evaluation",
    "spectr.extraction.svd",
    *(f"spectr.layers.{name}" for name in ("multi_routed", "routed_linear", "trace")),
    "spectr.merging.dare",
    "spectr.merging.lowrank",
    "spectr.merging.ties",
    *(f"spectr.ops.{name}" for name in ("add_outputs", "grouped", "reference_ops", "rules")),
    "spectr.routers",
    "spectr.selection",
    "spectr.spectral",
)
install_import_hook(list(CHECKED), "beartype.beartype")

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

from adapters_on_disk import tree, write_adapter  # noqa: E402
from spectr import calibration  # noqa: E402
from spectr.library import LibraryStore  # noqa: E402
from spectr.models.samples import null_samples  # noqa: E402
from text_model import save_experts, save_model  # noqa: E402
from written_once import null_once  # noqa: E402

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore Ctrl-C


def pytest_sessionstart() -> None:
    """PEFT writes no model cards: that takes longer than the rest of saving, and no test reads them."""
    from peft import PeftModel

    PeftModel.create_or_update_model_card = Mock()
    assert all(map(find_spec, CHECKED)), "a module has a new name"


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
    place = item.path.relative_to(Path(__file__).parent).as_posix()
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
