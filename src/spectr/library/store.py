"""A library folder on disk: adding, removing and verifying, safe against being killed at any moment.

An expert lives in a folder of its own, named ``<name>-<start of its hash>``, exactly as PEFT wrote it, so that PEFT
can load it too. What counts is the manifest alone. To add: copy beside, rename into place, then replace the manifest.
To remove: replace the manifest, then delete. Whatever a kill leaves behind is not in the manifest, is ignored by
readers, and is swept up by the next writer.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor

from spectr.adapters import GATES_FILE, Expert, read_adapter, read_gates, write_gates
from spectr.adapters.config import CONFIG_FILE
from spectr.adapters.read import WEIGHTS_FILE
from spectr.errors import AdapterError, LibraryError, SpectrError, did_you_mean
from spectr.hashing import file_sha256
from spectr.library.index import INDEX_FOLDER
from spectr.library.manifest import (
    MANIFEST_FILE,
    Entry,
    Manifest,
    read_manifest,
    write_manifest,
)
from spectr.saving import SCRATCH, sync_folder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_KEPT_FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md", "expert.json", GATES_FILE)
_INCOMING = ".incoming-"
_DIGITS = 12
_PATIENCE = 60  # seconds that a writer waits for another


class LibraryStore:
    """Reads and changes a library folder.

    Args:
        root: The folder; one that does not exist is an empty library, and is made by the first :meth:`add`.
    """

    def __init__(self, root: str | Path):
        self.root = Path(os.path.expanduser(root))

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest as it was when first asked for, or as this object last wrote it."""
        return read_manifest(self.root) if (self.root / MANIFEST_FILE).is_file() else Manifest()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The experts' entries, in alphabetical order."""
        return self.manifest.experts

    def entry(self, name: str) -> Entry:
        """The entry of an expert.

        Raises:
            LibraryError: There is no expert of that name.
        """
        by_name = {entry.name: entry for entry in self.entries}
        if name not in by_name:
            raise LibraryError(f"{self.root} has no expert '{name}'", do=did_you_mean(name, by_name))
        return by_name[name]

    def reader(self, entry: Entry) -> Callable[[], Expert]:
        """A function that reads the expert; its values were checked when it was added."""
        folder = (self.root / entry.folder).absolute()  # absolute, so that it is never taken for a Hub id

        def read() -> Expert:
            try:
                return read_adapter(folder, entry.name, check_values=False)
            except AdapterError as error:
                raise LibraryError(
                    f"{self.root} is damaged: {error.given}",
                    expected=error.expected,
                    do=f"see all that is wrong: spectr library verify -l {self.root}",
                ) from error

        return read

    def add(self, name: str, source: str | Path, *, replace: bool = False) -> Entry:
        """Copy an adapter into the library.

        Args:
            name: The expert's name: letters, digits, dot, dash, underscore.
            source: PEFT folder or Hub id.
            replace: Put it in the place of an expert of that name.

        Raises:
            AdapterError: The adapter is missing, damaged, or cannot be routed exactly.
            LibraryError: The name is taken or not allowed, the expert's modules have other sizes than those of the
                experts that are there, or the folder cannot be written. Nothing was changed.
        """
        if not _NAME.fullmatch(name):
            raise LibraryError(
                f"'{name}' cannot be an expert's name",
                expected="up to 100 letters, digits, dots, dashes and underscores, a letter or digit first",
            )
        expert = read_adapter(source, name)
        read_gates(expert)
        with self._writing():
            if not replace and any(entry.name == name for entry in self.entries):
                raise LibraryError(
                    f"{self.root} already has an expert '{name}'",
                    do="choose another name, or say --replace (replace=True)",
                )
            self._check_sizes(expert)
            entry = self._copy_in(expert)
            self._commit(self.manifest.with_entry(entry))
        return entry

    def add_gates(self, name: str, gates: Mapping[str, Float[Tensor, " I"]], facts: Mapping[str, Any]) -> Entry:
        """Put PHATGOOSE gates beside an expert's weights, in the place of older ones.

        Args:
            name: The expert.
            gates: By module one vector, (inputs,).
            facts: How they were made, for the record (JSON).

        Raises:
            LibraryError: There is no such expert, or the folder cannot be written. Nothing was changed.
            AdapterError: The gates do not fit the expert.
        """
        with self._writing():
            before = self.entry(name)
            entry = self._copy_in(self.reader(before)(), lambda folder: write_gates(folder / GATES_FILE, gates, facts))
            kept = {"origin": before.origin, "added": before.added}
            self._commit(self.manifest.with_entry(entry.model_copy(update=kept)))
        return self.entry(name)

    def _check_sizes(self, expert: Expert) -> None:
        """Raise :class:`LibraryError` where the expert is for another base model than the first one that is there."""
        other = next((entry for entry in self.entries if entry.name != expert.name), None)
        if other is None:
            return
        try:
            there = self.reader(other)().shapes
        except LibraryError:  # a damaged expert is no reason to refuse another one
            return
        for module, shape in expert.shapes.items():
            known = there.get(module)
            if known and (known.inputs, known.outputs) != (shape.inputs, shape.outputs):
                raise LibraryError(
                    f"'{expert.name}' does not go with '{other.name}' of {self.root}: {module} is {shape.inputs} -> "
                    f"{shape.outputs}, and {known.inputs} -> {known.outputs} there",
                    expected=f"experts of one base model ({other.base_model or 'not stated'} there, "
                    f"{expert.base_model or 'not stated'} here)",
                    do="keep it in a library of its own: another --library",
                )

    def remove(self, name: str) -> None:
        """Take an expert out of the library and delete its files.

        Raises:
            LibraryError: There is no such expert, or the folder cannot be written.
        """
        self.entry(name)
        with self._writing():
            self._commit(self.manifest.without(name))

    def verify(self) -> dict[str, SpectrError | None]:
        """Check every expert's files against their hashes, and read them: by name, what is wrong, or ``None``."""
        return {entry.name: self._fault(entry) for entry in self.entries}

    def _fault(self, entry: Entry) -> SpectrError | None:
        try:
            return self._changed_file(entry) or self._unreadable(entry)
        except OSError as error:
            return LibraryError(
                f"expert '{entry.name}' cannot be read: {error}", do="check the permissions of its files"
            )

    def _changed_file(self, entry: Entry) -> SpectrError | None:
        for file, expected in entry.sha256.items():
            path = self.root / entry.folder / file
            if not path.is_file():
                return LibraryError(
                    f"{path} is missing", do=f"spectr library add {entry.name} ADAPTER --library {self.root} --replace"
                )
            if file_sha256(path) != expected:
                return LibraryError(
                    f"{path} is not the file that was added (its SHA-256 differs)",
                    expected=expected,
                    do=f"add the expert again from {entry.origin or 'its origin'}, with --replace",
                )
        return None

    def _unreadable(self, entry: Entry) -> SpectrError | None:
        try:
            read_gates(read_adapter((self.root / entry.folder).absolute(), entry.name))
        except SpectrError as error:
            return error
        return None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the library's lock, with a fresh manifest; turn what the file system refuses into our error."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".lock", timeout=_PATIENCE):
                self.__dict__.pop("manifest", None)
                if not (self.root / MANIFEST_FILE).is_file():
                    self._begin()
                self._sweep()
                yield
        except Timeout as error:
            raise LibraryError(
                f"{self.root} has been in use by another writer for {_PATIENCE} s; nothing was changed",
                do="try again when the other command has ended",
            ) from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise LibraryError(
                f"{self.root} cannot be written: {error.strerror or error}; the library is as it was",
                expected="a folder that can be written, with room for the expert",
                do="free some space and try again" if full else "check the path and its permissions",
            ) from error

    def _begin(self) -> None:
        """Make this folder a library, unless it holds adapters that a new manifest would hide."""
        adapters = sorted(path.name for path in self.root.iterdir() if (path / CONFIG_FILE).is_file())
        if adapters:
            raise LibraryError(
                f"{self.root} holds adapters ({', '.join(adapters[:5])}) but no {MANIFEST_FILE}: it is a plain folder "
                "of adapters, or a library that lost its manifest",
                expected="a library, or a folder without adapters",
                do=f"make a new library and add them: spectr library add NAME {self.root / adapters[0]} --library NEW",
            )
        write_manifest(self.root, Manifest())

    def _copy_in(self, expert: Expert, alter: Callable[[Path], None] = lambda _: None) -> Entry:
        source = expert.weights.parent
        scratch = Path(tempfile.mkdtemp(dir=self.root, prefix=_INCOMING))
        try:
            for file in _KEPT_FILES:
                if (source / file).is_file():
                    _copy_to_disk(source / file, scratch / file)
            alter(scratch)
            digests = _digests(scratch)
            # What counts is the copy, should the source change under our hands.
            read_gates(read_adapter(scratch, expert.name))
            folder = self.root / f"{expert.name}-{_content_digits(digests)}"
            self._put_in_place(scratch, folder, digests)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        sync_folder(self.root)
        return Entry(
            name=expert.name,
            folder=folder.name,
            sha256=digests,
            ranks=expert.ranks,
            modules=len(expert.shapes),
            targets=tuple(sorted({module.rpartition(".")[2] for module in expert.shapes})),
            parameters=expert.parameters,
            base_model=expert.base_model,
            origin=expert.origin,
            added=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def _put_in_place(self, scratch: Path, folder: Path, digests: dict[str, str]) -> None:
        if folder.exists() and _digests(folder) == digests:
            shutil.rmtree(scratch)
            return
        if folder.exists():  # it is damaged: nothing is lost by a moment without it
            folder.rename(self.root / f"{_INCOMING}damaged-{scratch.name.removeprefix(_INCOMING)}")
        scratch.chmod(0o755)
        scratch.rename(folder)

    def _commit(self, manifest: Manifest) -> None:
        write_manifest(self.root, manifest)
        self.manifest = manifest
        self._sweep()

    def _sweep(self) -> None:
        """Delete what killed or finished writers left: half-made copies, and folders of ours that do not count."""
        kept = {entry.folder for entry in self.entries}
        for path in self.root.iterdir():
            if path.name.startswith(SCRATCH):
                path.unlink(missing_ok=True)
            elif path.is_dir() and path.name.startswith(_INCOMING):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir() and path.name not in kept and _is_ours(path):
                doomed = path.rename(self.root / f"{_INCOMING}removed-{path.name}")  # half of it would not be ours
                shutil.rmtree(doomed, ignore_errors=True)
        names = {entry.name for entry in self.entries}
        for path in (self.root / INDEX_FOLDER).glob("*"):
            if path.stem not in names or path.name.startswith(SCRATCH):
                path.unlink(missing_ok=True)


def _digests(folder: Path) -> dict[str, str]:
    return {file: file_sha256(folder / file) for file in _KEPT_FILES if (folder / file).is_file()}


def _content_digits(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _is_ours(folder: Path) -> bool:
    """Whether a folder is named after the hash of its content, as only this module names folders."""
    suffix = folder.name.rpartition("-")[2]
    return len(suffix) == _DIGITS and (folder / WEIGHTS_FILE).is_file() and _content_digits(_digests(folder)) == suffix


def _copy_to_disk(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)
        writing.flush()
        os.fsync(writing.fileno())
