"""Tests in a running engine, collected only where vLLM is installed (found out without importing it).

The tests in ``plugin`` need no engine.
"""

from pathlib import Path

import pytest

from spectr.vllm.register import engine_version

HERE = Path(__file__).parent
collect_ignore_glob = [] if engine_version() else ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # the engine's and its libraries' own


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A tiny model with heads of the size that the engine's attention takes, and five experts for it."""
    from engine import make_world

    return make_world(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def calibrated(served, tmp_path_factory):
    """The same with a tokenizer, its experts calibrated."""
    from deciding import make_calibrated

    return make_calibrated(served, tmp_path_factory.mktemp("calibrated"))
