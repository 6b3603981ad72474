"""A disk that is full or refuses, and files that are not ours: nothing is lost."""

import errno
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from adapters_on_disk import assert_says, tree, write_adapter
from library_on_disk import CONFIG, WEIGHTS, assert_sound, names
from spectr.errors import AdapterError, LibraryError
from spectr.library import LibraryStore
from spectr.library.description_file import read_descriptions, write_descriptions

pytestmark = pytest.mark.usefixtures("no_sync")


def refusing(monkeypatch, owner, attribute: str, number: int, *, at_call: int = 1, before=lambda *_: None) -> None:
    """Let the n-th call of a function of the operating system fail, as its ``errno`` says."""
    real, calls = getattr(owner, attribute), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == at_call:
            before(*args)
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, call)


def write_half(reading, writing, *_) -> None:
    writing.write(reading.read()[:-50])


STEPS_OF_ADDING = {
    "making the scratch folder": (tempfile, "mkdtemp", 1),
    "copying the configuration": (shutil, "copyfileobj", 1),
    "copying the weights": (shutil, "copyfileobj", 2),
    "flushing the configuration": (os, "fsync", 1),
    "flushing the weights": (os, "fsync", 2),
    "moving the folder into place": (Path, "rename", 1),
    "marking the folder": (Path, "touch", 1),
    "making the entry": (tempfile, "mkstemp", 1),
    "flushing the entry": (os, "fsync", 4),
    "putting the entry in place": (os, "replace", 1),
}


class TestDiskTrouble:
    @pytest.mark.parametrize(
        ("replace", "number"), [(False, errno.ENOSPC), (True, errno.EACCES)], ids=["add, full", "replace, forbidden"]
    )
    @pytest.mark.parametrize("step", STEPS_OF_ADDING.values(), ids=STEPS_OF_ADDING.keys())
    def test_adding_fails_at_any_step_and_changes_nothing(self, library, tmp_path, monkeypatch, step, replace, number):
        owner, attribute, at_call = step
        source = write_adapter(tmp_path / "new", seed=3)
        name = "sql" if replace else "med"
        before = tree(library.root)
        half = write_half if attribute == "copyfileobj" else lambda *_: None
        with monkeypatch.context() as patch:
            refusing(patch, owner, attribute, number, at_call=at_call, before=half)
            with pytest.raises(LibraryError) as caught:
                library.add(name, source, replace=replace)
        advice = {errno.ENOSPC: "free some space and try again", errno.EACCES: "check the path and its permissions"}
        assert_says(
            caught.value,
            given=(f"{library.root} cannot be written: {os.strerror(number)}; the library is unchanged",),
            expected="a writable folder with enough space for the expert",
            do=advice[number],
        )
        after = tree(library.root)
        assert {path: after[path] for path in before} == before
        assert LibraryStore(library.root).verify() == {"law": None, "sql": None}
        assert names(library.root) == ("law", "sql")
        library.add(name, source, replace=replace)
        assert_sound(library, *sorted({"law", "sql", name}))

    @pytest.mark.parametrize("step", [(Path, "touch", 1), (os, "unlink", 1)], ids=["mark", "delete the entry"])
    def test_removing_fails_at_any_step_and_changes_nothing(self, library, monkeypatch, unchanged, step):
        owner, attribute, at_call = step
        with monkeypatch.context() as patch:
            refusing(patch, owner, attribute, errno.ENOSPC, at_call=at_call)
            with pytest.raises(LibraryError, match="No space left on device; the library is unchanged"):
                library.remove("sql")
        assert unchanged()
        assert_sound(library, "law", "sql")
        library.remove("sql")
        assert_sound(library, "law")

    @pytest.mark.parametrize("use", ["add", "remove"])
    def test_a_folder_that_cannot_be_locked(self, library, adapter, monkeypatch, unchanged, use):
        (library.root / ".lock").unlink(missing_ok=True)
        real = os.open

        def forbidden(path, *args, **kwargs):
            if str(path).endswith(".lock"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **kwargs)

        change = {"add": lambda: library.add("med", adapter), "remove": lambda: library.remove("sql")}[use]
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", forbidden)
            with pytest.raises(LibraryError) as caught:
                change()
        assert_says(
            caught.value,
            given=(f"{library.root} cannot be written: Permission denied; the library is unchanged",),
            expected="a writable folder",
            do="check the path and its permissions",
        )
        assert unchanged()

    def test_a_root_that_cannot_be_made(self, tmp_path, adapter, monkeypatch):
        refusing(monkeypatch, os, "mkdir", errno.EROFS)
        with pytest.raises(LibraryError) as caught:
            LibraryStore(tmp_path / "library").add("sql", adapter)
        given = (f"{tmp_path / 'library'} cannot be written: Read-only file system",)
        assert_says(caught.value, given=given, expected="a writable folder", do="check the path")

    def test_a_source_that_changes_while_it_is_copied_is_not_added(self, library, tmp_path, monkeypatch, unchanged):
        source = write_adapter(tmp_path / "new", seed=3)
        real = shutil.copyfileobj

        def garbled(reading, writing, *args):
            real(reading, writing, *args)
            if reading.name.endswith(WEIGHTS):
                writing.truncate(60)

        monkeypatch.setattr(shutil, "copyfileobj", garbled)
        with pytest.raises(AdapterError, match="cannot be read as safetensors"):
            library.add("med", source)
        assert unchanged()


class TestFoldersOfTheUser:
    @pytest.mark.parametrize("name", ["notes", "backup-0123456789ab", "sql-0123456789ab", ".git"])
    @pytest.mark.parametrize("content", ["adapter", "text", "empty"])
    def test_are_never_deleted(self, library, tmp_path, name, content):
        mine = library.root / name
        mine.mkdir()
        if content == "adapter":
            write_adapter(mine, seed=9)
        if content == "text":
            (mine / "todo.txt").write_text("feed the cat")
        (library.root / "todo.txt").write_text("feed the dog")
        before = tree(mine)
        library.add("med", write_adapter(tmp_path / "new", seed=3))
        library.add("sql", tmp_path / "new", replace=True)
        library.remove("law")
        assert mine.is_dir()
        assert tree(mine) == before
        assert (library.root / "todo.txt").read_text() == "feed the dog"
        assert names(library.root) == ("med", "sql")

    def test_links_are_not_followed_when_cleaning_up(self, library, tmp_path, adapter):
        outside = write_adapter(tmp_path / "outside")
        (library.root / ".incoming-link").symlink_to(outside)
        before = tree(outside)
        library.add("med", adapter)
        assert tree(outside) == before


def test_what_killed_writers_left_is_swept_up(library, adapter):
    scratch = library.root / ".incoming-abc"
    scratch.mkdir()
    (scratch / CONFIG).write_text("{")
    orphan = library.entry("sql").folder.replace("sql", "gone")
    shutil.copytree(library.root / library.entry("sql").folder, library.root / orphan)
    (library.root / f".pending-{orphan}").touch()
    (library.root / f".pending-{library.entry('law').folder}").touch()  # killed before it had gone
    assert names(library.root) == ("law", "sql")
    library.add("med", adapter)
    assert_sound(library, "law", "med", "sql")
    assert not list(library.root.glob(".pending-*"))


def test_a_file_beside_the_experts_is_written_while_another_process_adds_one(library, adapter, monkeypatch):
    """Writers delete scratch files that they find, which a killed process left; this one's process lives."""
    import spectr.library.description_file as written

    real, other = written.replacing, Thread(target=lambda: library_of(library).add("med", adapter))

    @contextmanager
    def meanwhile(target):
        with real(target) as scratch:
            other.start()
            other.join(timeout=0.5)
            yield scratch

    monkeypatch.setattr(written, "replacing", meanwhile)
    write_descriptions(library.root, {"law": "about laws"})
    other.join()
    assert read_descriptions(library.root) == {"law": "about laws"}
    assert_sound(library_of(library), "law", "med", "sql")


def library_of(library):
    """The same folder, as another process opens it."""
    return LibraryStore(library.root)
