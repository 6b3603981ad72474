"""A library of experts: ordered names, and experts on request."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from spectr.adapters import CONFIG_FILE, WEIGHTS_FILE, Expert, Naming, named_for, read_adapter
from spectr.adapters.read import stages
from spectr.errors import AdapterError, LibraryError, did_you_mean, map_together, raise_together, some_of
from spectr.hashing import known_sha256
from spectr.library.calibration_file import Calibration
from spectr.library.description_file import read_descriptions
from spectr.library.index import Index
from spectr.library.manifest import MANIFEST_FILE
from spectr.library.store import LibraryStore

Reader = Callable[[], Expert]


def _holds_adapter(folder: Path) -> bool:
    """Whether a folder is meant to be an adapter: it has a configuration, or weights without one."""
    return any((folder / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE))


def _no_experts(root: Path) -> LibraryError:
    expected = f"a {MANIFEST_FILE}, or folders with {CONFIG_FILE}"
    if (root / CONFIG_FILE).is_file():
        return LibraryError(
            f"{root} holds no experts (it is an adapter itself)",
            expected=expected,
            do=f"pass its parent folder, or add it to a library: spectr library add NAME {root} --library LIBRARY",
        )
    inner = next((path for path in sorted(root.iterdir()) if (path / MANIFEST_FILE).is_file()), None)
    do = f"use the library inside it: {inner}" if inner else f"spectr library add NAME ADAPTER --library {root}"
    return LibraryError(f"{root} holds no experts", expected=expected, do=do)


def _check_separate(root: Path, names: list[str]) -> None:
    """Raise :class:`LibraryError` if a folder's adapters are parts of one thing instead of experts."""
    several = "spectr.ExpertLibrary.from_adapters({NAME: FOLDER, ...})"
    if stages(names):
        last = max(names, key=lambda name: int(name.rpartition("-")[2]))
        raise LibraryError(
            f"{root} holds the checkpoints of one training run ({some_of(sorted(names), 3)})",
            expected="a folder of experts",
            do=f"add one to a library: spectr library add NAME {root / last} --library LIBRARY; or all: {several}",
        )
    if (root / CONFIG_FILE).is_file():
        raise LibraryError(
            f"{root} is an adapter itself and holds others in subfolders ({some_of(names, 3)})",
            expected="a folder of experts",
            do=f"add those that are experts: spectr library add NAME FOLDER --library LIBRARY; or {several}",
        )


def _given(value: Any) -> Any:
    """Return the argument, for code that expects a reading function; can be pickled, unlike a lambda."""
    return value


_NO_CALIBRATION, _NO_INDEX = partial(_given, None), partial(Index, {})


class ExpertLibrary:
    """Experts by name, in alphabetical order. Reading one opens its file; nothing else is loaded.

    Make one with :meth:`open` or :meth:`from_adapters`.

    Attributes:
        origin: A description of where the experts came from.
        folder: The folder with further files of the library; ``None`` if the adapters have no common folder.
    """

    def __init__(
        self,
        readers: Mapping[str, Reader],
        origin: str,
        calibration: Callable[[], Calibration | None] = _NO_CALIBRATION,
        descriptions: Callable[[], Mapping[str, str]] = dict,
        index: Callable[[], Index] = _NO_INDEX,
        digests: Mapping[str, str] | None = None,
        naming: Naming | None = None,
        folder: Path | None = None,
    ):
        self._readers = dict(sorted(readers.items()))
        self.origin, self.folder = origin, folder
        self._read_calibration, self._read_descriptions = calibration, descriptions
        self._read_index, self._digests, self._naming = index, dict(digests or {}), naming

    @classmethod
    def open(cls, path: str | Path) -> ExpertLibrary:
        """Open the experts of a folder: a library of ``spectr library``, or a plain folder of PEFT adapters.

        A library is opened by its entries alone; the experts' files are not read.

        Raises:
            LibraryError: The folder is missing or holds no experts, or its entries are damaged.
            AdapterError: Adapters of a plain folder cannot be used; lists all of them.
        """
        root = Path(os.path.expanduser(path))
        if root.is_file():
            raise LibraryError(f"{root} is a file", expected="a folder of experts", do="check --library")
        if not root.is_dir():
            raise LibraryError(
                f"there is no library folder {root}",
                expected="a folder of experts",
                do=f"create one: spectr library add NAME ADAPTER --library {root}",
            )
        if (root / MANIFEST_FILE).is_file():
            store = LibraryStore(root)
            readers = {entry.name: store.reader(entry) for entry in store.entries}
            digests = {entry.name: entry.sha256[WEIGHTS_FILE] for entry in store.entries}
            return cls(readers, str(root), digests=digests)._with_folder(root)
        visible = [folder for folder in sorted(root.absolute().iterdir()) if not folder.name.startswith(".")]
        adapters = {folder.name: folder for folder in visible if _holds_adapter(folder)}
        if not adapters:
            raise _no_experts(root)
        _check_separate(root, list(adapters))
        return cls.from_adapters(adapters, origin=str(root))._with_folder(root)

    @classmethod
    def from_adapters(cls, adapters: Mapping[str, str | Path], origin: str = "adapters") -> ExpertLibrary:
        """Make a library of PEFT folders and Hub ids, by name; copies nothing.

        Raises:
            AdapterError: Adapters cannot be used; lists all of them.
        """
        if not adapters:
            raise LibraryError("no adapters were given", do='name at least one: {"sql": "org/sql-lora"}')
        title = "the adapters cannot be used"
        experts = map_together(title, lambda name: read_adapter(adapters[name], name), adapters, AdapterError)
        return cls({expert.name: partial(_given, expert) for expert in experts}, origin)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts, in alphabetical order."""
        return tuple(self._readers)

    def with_expert(self, name: str, source: str | Path) -> ExpertLibrary:
        """This library with one more expert; changes nothing on disk.

        Raises:
            LibraryError: The name is taken.
            AdapterError: The adapter cannot be used.
        """
        if name in self._readers:
            raise LibraryError(f"an expert '{name}' already exists", do="remove it first, or choose another name")
        expert = read_adapter(source, name)
        return self._but(readers={**self._readers, name: partial(_given, expert)})

    def without(self, name: str) -> ExpertLibrary:
        """This library without one expert; changes nothing on disk."""
        self.check(name)
        readers, digests = ({n: v for n, v in d.items() if n != name} for d in (self._readers, self._digests))
        return self._but(readers=readers, digests=digests)

    def sha256(self, name: str) -> str:
        """Hash of an expert's weights: from its entry, or in a plain folder from the file."""
        self.check(name)
        return self._digests.get(name) or known_sha256(self[name].weights)

    def check_weights(self, expert: Expert) -> None:
        """Check that an expert's weights match its entry; a plain folder has no entries.

        Raises:
            LibraryError: They differ.
        """
        known = self._digests.get(expert.name)
        if known and known_sha256(expert.weights) != known:
            raise LibraryError(
                f"{expert.weights} changed since it was added (its SHA-256 differs)",
                expected=known,
                do=f"add '{expert.name}' again with --replace; see spectr library verify --library {self.origin}",
            )

    @cached_property
    def calibration(self) -> Calibration | None:
        """The experts' statistics on calibration texts, or ``None``; read on first use.

        Raises:
            LibraryError: The file is damaged.
        """
        return self._read_calibration()

    def with_calibration(self, calibration: Calibration) -> ExpertLibrary:
        """This library with a calibration; changes nothing on disk."""
        return self._but(calibration=partial(_given, calibration))

    @cached_property
    def descriptions(self) -> Mapping[str, str]:
        """Descriptions of the experts by name; read on first use.

        Raises:
            LibraryError: The file is damaged.
        """
        return self._read_descriptions()

    def with_descriptions(self, descriptions: Mapping[str, str]) -> ExpertLibrary:
        """This library with other descriptions; changes nothing on disk."""
        return self._but(descriptions=partial(_given, descriptions))

    @cached_property
    def index(self) -> Index:
        """The index for routing among very many experts (:func:`spectr.build_index`); read on first use.

        Raises:
            LibraryError: An entry is damaged.
        """
        return self._read_index()

    def with_index(self, index: Index) -> ExpertLibrary:
        """This library with another index; changes nothing on disk."""
        return self._but(index=partial(_given, index))

    def named_for(self, naming: Naming) -> ExpertLibrary:
        """This library with a model's module names; changes nothing on disk."""
        return self._but(naming=naming)

    def calibrated(self, name: str) -> bool:
        """Whether the calibration covers exactly this expert, by its weights."""
        return self.calibration is not None and self.calibration.sha256.get(name) == self.sha256(name)

    def fully_calibrated(self, null: int) -> bool:
        """Whether the calibration covers all experts, and has their evidence of at least ``null`` ordinary prompts."""
        known = self.calibration
        if known is None or len(known.null) < null or known.null_experts != self.names:
            return False
        return all(self.calibrated(name) and name in known.norms for name in self)

    def indexed(self, name: str) -> bool:
        """Whether the index covers exactly this expert, by its weights, with the library's calibration."""
        if name not in self.index or self.calibration is None:
            return False
        entry = self.index[name]
        return entry.sha256 == self.sha256(name) and entry.calibration == self.calibration.said.digest

    def _with_folder(self, root: Path) -> ExpertLibrary:
        """This library with the further files in its folder."""
        return self._but(
            folder=root,
            calibration=partial(Calibration.load, root),
            descriptions=partial(read_descriptions, root),
            index=partial(Index.open, root, self.names),
        )

    def _but(self, **changed: Any) -> ExpertLibrary:
        kept = {
            "readers": self._readers,
            "origin": self.origin,
            "calibration": self._read_calibration,
            "descriptions": self._read_descriptions,
            "index": self._read_index,
            "digests": self._digests,
            "folder": self.folder,
            "naming": self._naming,
        }
        return ExpertLibrary(**{**kept, **changed})

    def check(self, *names: str) -> None:
        """Raise :class:`LibraryError` for names that the library does not have."""
        unknown = [
            LibraryError(f"unknown expert '{n}'", do=did_you_mean(n, self.names)) for n in names if n not in self
        ]
        raise_together("unknown experts", unknown, LibraryError)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: cached values are read again."""
        read = ("calibration", "descriptions", "index")
        return {name: value for name, value in vars(self).items() if name not in read}

    def __getitem__(self, name: str) -> Expert:
        self.check(name)
        expert = self._readers[name]()
        return expert if self._naming is None else named_for(expert, self._naming)

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __repr__(self) -> str:
        return f"ExpertLibrary({self.origin!r}, {len(self)} experts: {', '.join(self.names[:12])})"
