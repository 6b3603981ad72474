"""A writer that is killed at any moment leaves the old library or the new one, and the next writer cleans up."""

import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_on_disk import tree, write_adapter
from library_on_disk import folders, to_first_format
from spectr.library import ExpertLibrary, LibraryStore

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the child that is killed is a fork"),
    pytest.mark.usefixtures("no_sync"),
]

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}
STEPS_AT_MOST = 200
State = dict[str, dict[str, str]]


def die_at_step(last: int) -> None:
    """Kill this process at the n-th step of its work on the file system.

    A step is the moment before each change, as Python's own audit announces it, and before each ``fsync``; the moment
    after a file was opened for writing, when it is empty; and the moment when half of a file was copied.
    """
    steps, opened = iter(range(1, sys.maxsize)), []

    def step() -> None:
        if next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple) -> None:
        writes = event == "open" and _writes(*args)
        if event in CHANGES or writes:
            step()
        if writes:
            opened.append(args)

    def profile(frame, event: str, function) -> None:
        if opened and event == "c_return" and getattr(function, "__name__", "") == "open":
            opened.clear()
            step()

    real_copy = shutil.copyfileobj

    def copy(reading, writing, *args) -> None:
        writing.write(reading.read(50))
        writing.flush()
        step()
        real_copy(reading, writing, *args)

    os.fsync, shutil.copyfileobj = (lambda descriptor: step()), copy
    sys.addaudithook(audit)
    sys.setprofile(profile)


def _writes(path: object, mode: str | None, flags: int) -> bool:
    """Whether a file is opened to be written; what wraps a descriptor opens nothing."""
    if isinstance(path, int):
        return False
    if mode is None:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    return any(letter in mode for letter in "wax+")


def in_child(work: Callable[[], object], *, killed_at: int | None = None) -> bool:
    """Run ``work`` in a fork; whether it was killed. A child that fails by itself fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking where there are threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            if killed_at is not None:
                die_at_step(killed_at)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed: see its output"
    return False


def state(root: Path) -> State:
    return {entry.name: entry.sha256 for entry in LibraryStore(root).entries}


def content(folder: Path) -> dict[str, str]:
    return {path: digest for path, digest in tree(folder).items() if digest != "folder"}


def strays(root: Path) -> set[str]:
    """Folders that do not count."""
    kept = {entry.folder for entry in LibraryStore(root).entries}
    return folders(root) - kept


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: write_adapter(root / name, seed=seed) for seed, name in enumerate(["law", "sql", "new", "next"])}


@pytest.fixture(scope="module")
def original(tmp_path_factory, sources) -> Path:
    store = LibraryStore(tmp_path_factory.mktemp("original") / "library")
    for name in ("law", "sql"):
        store.add(name, sources[name])
    return store.root


WRITES: dict[str, tuple[bool, Callable, Callable]] = {
    # does the library exist before; what the writer does; which sources the experts then have
    "add the first": (False, lambda s, src: s.add("med", src["new"]), lambda old, new: {"med": new}),
    "add": (True, lambda s, src: s.add("med", src["new"]), lambda old, new: {**old, "med": new}),
    "replace": (
        True,
        lambda s, src: s.add("sql", src["new"], replace=True),
        lambda old, new: {**old, "sql": new},
    ),
    "replace by the same": (True, lambda s, src: s.add("sql", src["sql"], replace=True), lambda old, new: old),
    "remove": (True, lambda s, src: s.remove("sql"), lambda old, new: {"law": old["law"]}),
}


CASES = {name: (*case, False) for name, case in WRITES.items()}
CASES |= {f"{name}, format 1": (*case, True) for name, case in WRITES.items() if case[0]}


@pytest.mark.parametrize(("exists", "write", "result", "first_format"), CASES.values(), ids=CASES.keys())
def test_killed_at_any_step(tmp_path, sources, original, exists, write, result, first_format):
    old = {name: content(sources[name]) for name in ("law", "sql")} if exists else {}
    new = result(old, content(sources["new"]))
    seen = []
    for step in range(1, STEPS_AT_MOST):
        root = tmp_path / str(step)
        if exists:
            shutil.copytree(original, root)
        if first_format:
            to_first_format(root)
        killed = in_child(lambda root=root: write(LibraryStore(root), sources), killed_at=step)
        left = state(root)
        assert left in (old, new), f"killed at step {step}"
        seen.append(left == new)
        assert LibraryStore(root).verify() == dict.fromkeys(left)
        if exists:
            library = ExpertLibrary.open(root)
            assert library.names == tuple(sorted(left))
            for name in library:
                assert library[name].name == name
                assert content(library[name].weights.parent) == left[name]
        LibraryStore(root).add("next", sources["next"])
        after = LibraryStore(root)
        assert state(root) == {**left, "next": content(sources["next"])}
        assert after.verify() == dict.fromkeys([*left, "next"])
        assert strays(root) == set(), f"killed at step {step}"
        shutil.rmtree(root)
        if not killed:
            break
    assert not killed, "the writer never came through"
    assert step > 8, "hardly any step was seen: the test is blind"
    assert left == new
    assert seen == sorted(seen), "the new library came, and went again"
    if new != old:
        assert True in seen[:-1], "no kill hit the time after the change was made"


def test_a_writer_killed_again_and_again(tmp_path, sources, original):
    """One writer's leavings do not hinder the next, however many there were."""
    root = tmp_path / "library"
    shutil.copytree(original, root)
    for step in (3, 9, 14, 5, 11):
        assert in_child(lambda: LibraryStore(root).add("med", sources["new"]), killed_at=step)
    assert LibraryStore(root).verify() == {"law": None, "sql": None}
    LibraryStore(root).add("med", sources["new"])
    assert strays(root) == set()


def test_writers_at_the_same_time_lose_nothing(tmp_path, sources):
    """Four processes add, each its own expert; all of them are there in the end."""
    root = tmp_path / "library"
    children = []
    for name, source in sources.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(60)
                LibraryStore(root).add(name, source)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert state(root) == {name: content(source) for name, source in sources.items()}
    assert LibraryStore(root).verify() == dict.fromkeys(sorted(sources))
