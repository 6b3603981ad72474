"""Faults that were found once in adapters, libraries and tasks, and must not come back."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from adapters_on_disk import factors, tree, write_adapter
from spectr.adapters import read_adapter
from spectr.errors import AdapterError, DataError, LibraryError
from spectr.library import ExpertLibrary, LibraryStore
from spectr.tasks import Task, read_rows


# a library whose manifest is lost, or a plain folder: a new manifest would hide or sweep what is there
def test_nothing_is_added_where_a_new_manifest_would_hide_experts(library, adapter):
    (library.root / "manifest.json").unlink()
    before = tree(library.root)
    with pytest.raises(LibraryError, match=r"holds adapters \(law-.*without its manifest(.|\n)*--library NEW"):
        LibraryStore(library.root).add("med", adapter)
    assert tree(library.root) == before


def test_a_library_that_lost_its_manifest_can_be_built_again(library, tmp_path):
    entries = library.entries
    (library.root / "manifest.json").unlink()
    for entry in entries:
        LibraryStore(tmp_path / "new").add(entry.name, library.root / entry.folder)
    assert ExpertLibrary.open(tmp_path / "new").names == ("law", "sql")


# killed between mkstemp and os.replace: '.manifest-*' is never swept
def test_an_unfinished_manifest_is_swept(library, adapter):
    (library.root / ".manifest-abc").write_text("{")
    library.add("med", adapter)
    assert not (library.root / ".manifest-abc").exists()


# killed during the very first add: opens as a plain folder with experts that never were
@pytest.mark.parametrize("step", ["begin", "write_entry"])
def test_the_first_add_killed_after_the_rename_leaves_no_expert(tmp_path, adapter, monkeypatch, step):
    root = tmp_path / "library"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"spectr.library.store.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            LibraryStore(root).add("sql", adapter)
    if (root / "manifest.json").exists():
        assert ExpertLibrary.open(root).names == ()
    else:
        with pytest.raises(LibraryError, match="holds no experts"):
            ExpertLibrary.open(root)


def test_the_first_add_killed_while_copying_leaves_no_expert(tmp_path):
    write_adapter(tmp_path / ".incoming-abc")
    with pytest.raises(LibraryError, match="holds no experts"):
        ExpertLibrary.open(tmp_path)


# a folder that cannot be flushed after the manifest was replaced: the change was made, and counts
def test_a_folder_that_cannot_be_flushed_does_not_undo_the_change(library, tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    library.add("med", write_adapter(tmp_path / "med", seed=5))
    assert ExpertLibrary.open(library.root).names == ("law", "med", "sql")


# a relative library root: a missing expert folder is looked for on the Hub
def test_a_missing_expert_of_a_library_is_not_looked_for_on_the_hub(library, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir(library.root.parent)
    shutil.rmtree(library.root / library.entry("sql").folder)
    with pytest.raises(LibraryError, match="there is no folder"):
        ExpertLibrary.open(library.root.name)["sql"]


# a name that ends in a line break
def test_a_name_with_a_line_break(library, adapter):
    with pytest.raises(LibraryError, match="is not a valid expert name"):
        library.add("med\n", adapter)


# a manifest of a newer format with a new field says 'Extra inputs are not permitted', not its version
def test_a_newer_manifest_reports_it(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": 3, "experts": [], "colour": 1}')
    with pytest.raises(LibraryError, match="format 3 is not 2"):
        ExpertLibrary.open(tmp_path)


# raw exceptions instead of ours, from a downloaded configuration
@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": "x"}},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"(": 3}},
        {"alpha_pattern": {"q_proj": "x"}},
        {"alpha_pattern": {"q_proj": float("nan")}},
    ],
)
def test_patterns_that_are_wrong(tmp_path, config):
    with pytest.raises(AdapterError):
        read_adapter(write_adapter(tmp_path, **config), "sql")


def test_factors_that_are_scalars(tmp_path):
    tensors = {"m.lora_A.weight": torch.tensor(1.0), "m.lora_B.weight": torch.tensor(1.0)}
    with pytest.raises(AdapterError):
        read_adapter(write_adapter(tmp_path, tensors=tensors), "sql")


# two adapters in one file: the last one is silently taken
def test_two_adapters_in_one_file(tmp_path):
    tensors = {key.replace(".weight", f".{a}.weight"): t for a in ("one", "two") for key, t in factors().items()}
    with pytest.raises(AdapterError):
        read_adapter(write_adapter(tmp_path, tensors={k: v.clone() for k, v in tensors.items()}), "sql")


# an unreadable file stops verify, or escapes as PermissionError
def test_verify_reports_a_file_that_cannot_be_read(library, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("spectr.library.store.file_sha256", refuse)
    assert set(library.verify()) == {"law", "sql"}


def test_a_manifest_that_cannot_be_read(library, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(LibraryError):
        ExpertLibrary.open(library.root)


# many broken adapters: LibraryError, where the docstring says AdapterError (one broken adapter is an AdapterError)
def test_the_kind_of_error_does_not_hang_on_the_count(tmp_path):
    with pytest.raises(AdapterError):
        ExpertLibrary.from_adapters({"a": tmp_path / "x", "b": tmp_path / "y"})


# JSONL: line breaks of Unicode inside a string are legal JSON
def test_unicode_line_breaks_inside_a_row(tmp_path):
    rows = [{"text": "a\u2028b\u0085c"}]
    (tmp_path / "r.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows("r.jsonl", root=tmp_path) == rows


# raw UnicodeDecodeError, ValueError, IndexError, TypeError
def test_rows_and_tasks_that_are_not_utf8(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError):
        read_rows("r.jsonl", root=tmp_path)


def test_a_task_file_that_is_not_utf8(tmp_path):
    (tmp_path / "t.yaml").write_bytes(b"name: \xff")
    with pytest.raises(DataError):
        Task.load(tmp_path / "t.yaml")


@pytest.mark.parametrize("prompt", ["{text", "text}", "{}"])
def test_a_template_with_wrong_braces(prompt):
    with pytest.raises(DataError):
        Task.of(name="x", version=1, prompt=prompt, choices=["a", "b"]).example({"text": "t", "label": 0})


@pytest.mark.parametrize("ends", [None, 3, "abc", []])
def test_choices_of_a_row_that_are_no_list_of_texts(ends):
    task = Task.of(name="x", version=1, prompt="{text}", choices="ends")
    with pytest.raises(DataError):
        task.example({"text": "t", "label": 1, "ends": ends})


def test_a_label_of_true():
    with pytest.raises(DataError):
        Task.of(name="x", version=1, prompt="{text}", choices=["a", "b"]).example({"text": "t", "label": True})
