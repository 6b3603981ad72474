"""A library folder on disk: add, remove and verify experts, safely even if the process is killed.

Each expert has its own folder, named ``<name>-<start of its hash>``, in PEFT's format, so that PEFT can load it too.
The entries alone define what a library holds (``manifest.py``). To add: copy to a scratch folder, rename it into
place, then write the entry. To remove: delete the entry, then the folder. Before a folder is added or deleted, a mark
``.pending-<folder>`` is set, so that the next writer finds leftovers of a killed process without checking every folder.
Readers ignore the mark.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from spectr.adapters import (
    ADAPTER_FILES,
    CONFIG_FILE,
    GATES_FILE,
    WEIGHTS_FILE,
    Expert,
    read_adapter,
    read_gates,
    write_gates,
)
from spectr.adapters.text_facts import TextFacts, check_text
from spectr.atomic_write import INCOMING, SCRATCH, sync_file, sync_folder
from spectr.errors import AdapterError, LibraryError, SpectrError, did_you_mean
from spectr.hashing import file_sha256
from spectr.library.index import INDEX_FOLDER
from spectr.library.lock import locked
from spectr.library.manifest import (
    DIGITS,
    MANIFEST_FILE,
    NAME,
    Entry,
    any_entry,
    begin,
    content_digits,
    digests_of,
    drop_entry,
    entry_names,
    has_entry,
    read_entries,
    read_entry,
    without_card,
    write_entry,
)

_PENDING = ".pending-"
_FOLDER = re.compile(rf"(?P<name>{NAME.pattern})-(?P<digits>[0-9a-f]{{{DIGITS}}})")


class LibraryStore:
    """Reads and changes a library folder.

    Args:
        root: The folder. A missing folder is an empty library; the first :meth:`add` creates it.
    """

    def __init__(self, root: str | Path):
        self.root = Path(os.path.expanduser(root))

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The experts' entries in alphabetical order; read on first use and after each change by this object."""
        return read_entries(self.root)

    def entry(self, name: str) -> Entry:
        """The current entry of an expert.

        Raises:
            LibraryError: There is no expert of that name.
        """
        found = read_entry(self.root, name)
        if found is None:
            raise self._unknown(name)
        return found

    def _unknown(self, name: str) -> LibraryError:
        return LibraryError(f"{self.root} has no expert '{name}'", do=did_you_mean(name, entry_names(self.root)))

    def reader(self, entry: Entry) -> Callable[[], Expert]:
        """A function that reads the expert. Its values were checked when it was added."""
        return partial(self._read, entry)

    def _read(self, entry: Entry) -> Expert:
        folder = (self.root / entry.folder).absolute()  # an absolute path cannot be mistaken for a Hub id
        try:
            return read_adapter(folder, entry.name, check_values=False)
        except AdapterError as error:
            raise LibraryError(
                f"{self.root} is damaged: {error.given}",
                expected=error.expected,
                do=f"list all problems: spectr library verify -l {self.root}",
            ) from error

    def add(self, name: str, source: str | Path, *, replace: bool = False) -> Entry:
        """Copy an adapter into the library. If an expert of that name is the same but for its card, nothing changes.

        Args:
            name: The expert's name: letters, digits, dot, dash, underscore.
            source: PEFT folder or Hub id.
            replace: Replace the expert of that name.

        Raises:
            AdapterError: The adapter is missing, damaged, or cannot be routed exactly.
            LibraryError: The name is taken or not allowed, the expert's modules differ in size from those of the
                experts in the library, or the folder cannot be written. Nothing was changed.
        """
        if not NAME.fullmatch(name):
            raise LibraryError(
                f"'{name}' is not a valid expert name",
                expected="up to 100 letters, digits, dots, dashes and underscores; the first is a letter or digit",
            )
        expert = read_adapter(source, name)
        read_gates(expert)
        check_text(expert)
        with self._writing():
            if not replace and has_entry(self.root, name):
                if same := self._same(expert):
                    return same
                raise LibraryError(
                    f"{self.root} already has an expert '{name}'",
                    do="choose another name, or use --replace (replace=True)",
                )
            self._check_sizes(expert)
            return self._put(expert)

    def _same(self, expert: Expert) -> Entry | None:
        """The entry of an expert of this name, if it is whole and the same but for its card."""
        with suppress(LibraryError):
            entry = read_entry(self.root, expert.name)
            given = without_card(digests_of(expert.weights.parent))
            if entry and entry.sha256 == digests_of(self.root / entry.folder) and without_card(entry.sha256) == given:
                return entry
        return None

    def duplicates(self, entry: Entry) -> list[str]:
        """Other experts with the same files, by the names of their folders."""
        digits = entry.folder.rpartition("-")[2]
        names = sorted(folder["name"] for folder in self._expert_folders() if folder["digits"] == digits)
        return [name for name in names if name != entry.name and has_entry(self.root, name)]

    def _expert_folders(self) -> list[re.Match[str]]:
        """Matches of the folders whose names are those of experts' folders."""
        files = os.listdir(self.root) if self.root.is_dir() else []
        return [folder for file in files if (folder := _FOLDER.fullmatch(file))]

    def add_gates(self, name: str, gates: Mapping[str, Float[Tensor, " I"]], facts: Mapping[str, Any]) -> Entry:
        """Write PHATGOOSE gates next to an expert's weights; replaces older gates.

        Args:
            name: The expert.
            gates: By module, one vector (inputs,).
            facts: How they were trained, for the record (JSON).

        Raises:
            LibraryError: The expert does not exist, or the folder cannot be written. Nothing was changed.
            AdapterError: The gates do not fit the expert.
        """
        with self._writing():
            before = self.entry(name)
            return self._put(
                self.reader(before)(),
                lambda folder: write_gates(folder / GATES_FILE, gates, facts),
                origin=before.origin,
                added=before.added,
            )

    def _check_sizes(self, expert: Expert) -> None:
        """Raise :class:`LibraryError` if the expert has another base model than an expert in the library."""
        other = any_entry(self.root, but=expert.name)
        if other is None:
            return
        try:
            there = self.reader(other)().shapes
        except LibraryError:  # damage of one expert does not matter to another
            return
        for module, shape in expert.shapes.items():
            known = None if module in expert.fused else there.get(module)  # only a model can tell what these are
            if known and (known.inputs, known.outputs) != (shape.inputs, shape.outputs):
                raise LibraryError(
                    f"'{expert.name}' does not match '{other.name}' of {self.root}: {module} is {shape.inputs} -> "
                    f"{shape.outputs}, but {known.inputs} -> {known.outputs} there",
                    expected=f"experts of one base model ({other.base_model or 'not stated'} there, "
                    f"{expert.base_model or 'not stated'} here)",
                    do="add it to another library: choose another --library",
                )

    def remove(self, name: str) -> None:
        """Remove an expert from the library and delete its files.

        Raises:
            LibraryError: The expert does not exist, or the folder cannot be written.
        """
        if not has_entry(self.root, name):
            raise self._unknown(name)
        with self._writing(), self._pending(*self._folders(name)):
            drop_entry(self.root, name)

    def verify(self) -> dict[str, SpectrError | None]:
        """Check every expert's files against their hashes, and read them: the fault by name, or ``None``.

        Faults include damaged entries, and experts' folders whose entry is missing.
        """
        faults: dict[str, SpectrError | None] = {}
        for name in entry_names(self.root):
            try:
                entry = read_entry(self.root, name)
                if entry:  # else it was deleted since the names were listed
                    self._check(entry)
                    faults[name] = None
            except SpectrError as error:
                faults[name] = error
        return faults | self._lost()

    def _lost(self) -> dict[str, SpectrError]:
        """Experts whose folder exists without an entry, by name."""
        found: dict[str, SpectrError] = {}
        for folder in self._expert_folders():
            name, path = folder["name"], self.root / folder[0]
            pending = (self.root / f"{_PENDING}{folder[0]}").exists()  # a killed writer's; the next writer deletes it
            if not pending and not has_entry(self.root, name) and _is_ours(path):
                found[name] = LibraryError(
                    f"{path} has no entry, so that the library does not use it",
                    do=f"spectr library add {name} {path} --library {self.root}, or delete it",
                )
        return found

    def _check(self, entry: Entry) -> None:
        """Raise :class:`SpectrError` if an expert's files differ from those that were added."""
        try:
            for file, expected in entry.sha256.items():
                path = self.root / entry.folder / file
                if not path.is_file():
                    raise LibraryError(
                        f"{path} is missing",
                        do=f"spectr library add {entry.name} ADAPTER --library {self.root} --replace",
                    )
                if file_sha256(path) != expected:
                    raise LibraryError(
                        f"{path} changed since it was added (its SHA-256 differs)",
                        expected=expected,
                        do=f"add the expert again from {entry.origin or 'its origin'}, with --replace",
                    )
            read_gates(read_adapter((self.root / entry.folder).absolute(), entry.name))
        except OSError as error:
            raise LibraryError(
                f"expert '{entry.name}' cannot be read: {error}", do="check the permissions of its files"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the library's lock; report errors of the file system as ours."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with locked(self.root):
                self.__dict__.pop("entries", None)
                if not (self.root / MANIFEST_FILE).is_file():
                    self._begin()
                self._sweep()
                yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise LibraryError(
                f"{self.root} cannot be written: {error.strerror or error}; the library is unchanged",
                expected="a writable folder with enough space for the expert",
                do="free some space and try again" if full else "check the path and its permissions",
            ) from error

    def _begin(self) -> None:
        """Make this folder a library, unless it holds adapters, which a new manifest would hide."""
        if (self.root / CONFIG_FILE).is_file():
            raise LibraryError(
                f"{self.root} is an adapter itself", expected="a folder for a library", do="choose another --library"
            )
        adapters = sorted(path.name for path in self.root.iterdir() if (path / CONFIG_FILE).is_file())
        if adapters:
            raise LibraryError(
                f"{self.root} holds adapters ({', '.join(adapters[:5])}) but no {MANIFEST_FILE}: it is a plain folder "
                "of adapters, or a library without its manifest",
                expected="a library, or a folder without adapters",
                do=f"add them to a new library: spectr library add NAME {self.root / adapters[0]} --library NEW",
            )
        begin(self.root)

    def _put(self, expert: Expert, alter: Callable[[Path], None] = lambda _: None, **kept: str) -> Entry:
        """Copy an expert into the library and write its entry; replaces the expert of that name."""
        source = expert.weights.parent
        with tempfile.TemporaryDirectory(dir=self.root, prefix=INCOMING) as folder:
            scratch = Path(folder)
            for file in ADAPTER_FILES:
                if (source / file).is_file():
                    (scratch / file).parent.mkdir(exist_ok=True)
                    with (source / file).open("rb") as reading, (scratch / file).open("wb") as writing:
                        shutil.copyfileobj(reading, writing, 1 << 20)
                    sync_file(scratch / file)
            if facts := TextFacts.read(source):
                facts.write(scratch)
            alter(scratch)
            digests = digests_of(scratch)
            # Check the copy, in case the source changes meanwhile.
            read_gates(read_adapter(scratch, expert.name))
            entry = Entry(
                name=expert.name,
                folder=f"{expert.name}-{content_digits(digests)}",
                sha256=digests,
                ranks=expert.ranks,
                modules=len(expert.modules),
                targets=tuple(sorted({module.rpartition(".")[2] for module in expert.modules})),
                parameters=expert.parameters,
                base_model=expert.base_model,
                origin=kept.get("origin", expert.origin),
                added=kept.get("added", datetime.now(timezone.utc).isoformat(timespec="seconds")),
            )
            with self._pending(entry.folder, *self._folders(expert.name)):
                self._put_in_place(scratch, self.root / entry.folder, digests)
                sync_folder(self.root)
                write_entry(self.root, entry)
        return entry

    def _folders(self, name: str) -> list[str]:
        """The folder in an expert's entry; if the entry is damaged, all folders with its name."""
        try:
            entry = read_entry(self.root, name)
        except LibraryError:
            return [f[0] for f in self._expert_folders() if f["name"] == name and _is_ours(self.root / f[0])]
        return [entry.folder] if entry else []

    def _put_in_place(self, scratch: Path, folder: Path, digests: dict[str, str]) -> None:
        if folder.exists():
            if digests_of(folder) == digests:
                return
            # It is damaged, so that nothing is lost while it is missing.
            folder.rename(self.root / f"{INCOMING}damaged-{scratch.name.removeprefix(INCOMING)}")
        scratch.chmod(0o755)
        scratch.rename(folder)

    @contextmanager
    def _pending(self, *folders: str) -> Iterator[None]:
        """Mark folders that are added or removed; at the end, delete those without an entry."""
        for folder in folders:
            (self.root / f"{_PENDING}{folder}").touch()
        try:
            yield
        finally:
            self._sweep()

    def _sweep(self) -> None:
        """Delete leftovers of killed or finished writers: partial copies, and marked folders without an entry."""
        for file in [name for name in os.listdir(self.root) if name.startswith(".")]:
            path = self.root / file
            if file.startswith(_PENDING):
                self._settle(path)
            elif file.startswith(SCRATCH):
                path.unlink(missing_ok=True)
            elif file.startswith(INCOMING) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def _settle(self, mark: Path) -> None:
        folder = _FOLDER.fullmatch(mark.name.removeprefix(_PENDING))
        if folder is None:
            return  # not made by this module
        try:
            entry = read_entry(self.root, folder["name"])
        except LibraryError:
            return  # unknown until the entry is repaired
        if entry is None or entry.folder != folder[0]:
            shutil.rmtree(self.root / folder[0], ignore_errors=True)
        if entry is None:
            (self.root / INDEX_FOLDER / f"{folder['name']}.safetensors").unlink(missing_ok=True)
        mark.unlink()


def _is_ours(folder: Path) -> bool:
    """Whether a folder is named after the hash of its content; only this module uses such names."""
    return (folder / WEIGHTS_FILE).is_file() and folder.name.endswith(f"-{content_digits(digests_of(folder))}")
