"""What a large library keeps in memory of every expert, and what speeds up loading: one small file per expert.

``index/<expert>.safetensors`` holds, for each module, the *prototype* (the first row of ``V^T``, in 8 bits and in
full), its root mean square over the calibration's texts, and the *rotation* that aligns the adapter's factors
(:class:`spectr.spectral.Rotation`). A new expert adds one file and changes no other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from spectr.atomic_write import replacing, save_readable
from spectr.errors import LibraryError
from spectr.grouping import grouped
from spectr.library.calibration_file import opened
from spectr.library.lock import locked_if_library
from spectr.spectral import Codes, Prototypes, Rotation

INDEX_FOLDER = "index"
_FORMAT = "1"


class IndexedModule(NamedTuple):
    """A module that an expert adapts, and the sizes of the update there.

    Attributes:
        name: Name of the module.
        rank: Rank of the expert's factors.
        inputs: Inputs of the module.
        outputs: Outputs of the module.
        vectors: Number of vectors over the outputs that the update has besides the factors.
    """

    name: str
    rank: int
    inputs: int
    outputs: int
    vectors: int = 0

    @property
    def numbers(self) -> int:
        """Number of parameters in the update."""
        return self.rank * (self.inputs + self.outputs) + self.vectors * self.outputs


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexEntry:
    """One expert, with its modules one after the other along M (``C``: all their inputs).

    Attributes:
        modules: In alphabetical order.
        sha256: Hash of the expert's weights.
        calibration: Digest of the texts for ``rms_M``.
        codes_C: Prototypes, one after the other, in units of ``steps_M``.
        steps_M: Value of one unit of a code.
        error_M: ``||v - steps codes||_2``, the error of the 8 bits.
        rms_M: Root mean square of ``v . (x - m)`` over the calibration's texts; 0 if the expert has no effect.
        rotations: Function that returns rotations by module, for modules that one rotation can align.
        full_C: The prototypes in full, float32; read from the file on use. ``None`` in a file that an older version
            wrote.
    """

    modules: tuple[IndexedModule, ...]
    sha256: str
    calibration: str
    codes_C: Int8[Tensor, " C"]
    steps_M: Float[Tensor, " M"]
    error_M: Float[Tensor, " M"]
    rms_M: Float[Tensor, " M"]
    rotations: Callable[[], Mapping[str, Rotation]]
    full_C: Float[Tensor, " C"] | None

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        rotations = self.rotations()
        aligned = [module.name for module in self.modules if module.name in rotations]
        tensors = {"codes": self.codes_C, "steps": self.steps_M, "error": self.error_M, "rms": self.rms_M}
        tensors |= {} if self.full_C is None else {"full": self.full_C}
        for part in Rotation._fields:
            values = [getattr(rotations[name], part).flatten() for name in aligned]
            tensors[part] = torch.cat(values) if values else torch.zeros(0, dtype=torch.float32)
        facts = {"sha256": self.sha256, "calibration": self.calibration, "modules": self.modules, "aligned": aligned}
        path.parent.mkdir(parents=True, exist_ok=True)
        root = path.parent.parent  # where the library deletes leftovers
        with locked_if_library(root), replacing(path, scratch_in=root) as scratch:
            save_readable(tensors, scratch, {"format": _FORMAT, "facts": json.dumps(facts)})

    @staticmethod
    def load(path: Path) -> IndexEntry:
        """Read a file of :meth:`save`.

        Raises:
            LibraryError: It is damaged, or has another version.
        """
        try:
            with opened(path, _FORMAT) as (file, facts):
                return IndexEntry(
                    modules=tuple(IndexedModule(*module) for module in facts["modules"]),
                    sha256=facts["sha256"],
                    calibration=facts["calibration"],
                    codes_C=file.get_tensor("codes"),
                    steps_M=file.get_tensor("steps"),
                    error_M=file.get_tensor("error"),
                    rms_M=file.get_tensor("rms"),
                    rotations=partial(_read_rotations, path),
                    full_C=file.get_tensor("full") if "full" in set(file.keys()) else None,  # mapped, not read
                )
        except Exception as error:  # safetensors raises its own types
            raise _damaged(path, error) from error


def _read_rotations(path: Path) -> dict[str, Rotation]:
    try:
        with opened(path, _FORMAT) as (file, facts):
            left, S, right = (file.get_tensor(part) for part in Rotation._fields)
        ranks = {name: rank for name, rank, *_ in facts["modules"]}
        names = facts["aligned"]
        sizes = [ranks[name] for name in names]
        lefts, rights = (side.split([size * size for size in sizes]) for side in (left, right))
        rows = zip(names, lefts, S.split(sizes), rights, sizes, strict=True)
        return {name: Rotation(u.view(size, size), s, v.view(size, size)) for name, u, s, v, size in rows}
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> LibraryError:
    return LibraryError(
        f"{path} cannot be read ({error})",
        expected="an index entry that this version can read",
        do=f"index again: spectr library index --library {path.parent.parent} --fresh",
    )


class _Part(NamedTuple):
    """One module of experts that adapt the same modules."""

    experts: tuple[str, ...]
    entries: list[IndexEntry]
    place: int
    columns: slice
    device: torch.device

    def codes(self, bits: int) -> Codes:
        rms_E, steps_E, error_E = (
            torch.stack([values_M[self.place] for values_M in column])
            for column in zip(*((e.rms_M, e.steps_M, e.error_M) for e in self.entries), strict=True)
        )
        if bits == 8:
            codes_EI = torch.stack([entry.codes_C[self.columns] for entry in self.entries])
            return Codes(codes_EI, steps_E, rms_E, error_E).to(self.device)
        return Codes.of(self.full(), rms_E, bits).to(self.device)

    def full(self) -> Float[Tensor, "E I"]:
        rows = [entry.full_C[self.columns] for entry in self.entries if entry.full_C is not None]
        assert len(rows) == len(self.entries)
        return torch.stack(rows)


class Index(Mapping[str, IndexEntry]):
    """The entries of a library's experts by name, read on first use."""

    def __init__(self, entries: Mapping[str, IndexEntry | Path]):
        self._entries: dict[str, IndexEntry | Path] = dict(sorted(entries.items()))

    @staticmethod
    def open(root: Path, experts: Iterable[str]) -> Index:
        """Open the entries in a library's folder for these experts."""
        folder = root / INDEX_FOLDER
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        files = {name: f"{name}.safetensors" for name in experts}
        return Index({name: folder / file for name, file in files.items() if file in there})

    def joined(self, entries: Mapping[str, IndexEntry | Path]) -> Index:
        """This index with entries added or replaced."""
        return Index({**self._entries, **entries})

    def alike(self, names: Iterable[str]) -> dict[tuple[IndexedModule, ...], tuple[str, ...]]:
        """These experts, grouped by equal modules and sizes."""
        found = grouped((self[name].modules, name) for name in sorted(names))
        return {modules: tuple(together) for modules, together in found.items()}

    def prototypes(
        self, names: Iterable[str], means: Mapping[str, Float[Tensor, " I"]], bits: int = 8
    ) -> dict[str, Prototypes]:
        """The prototypes of these experts by module, on the device of the means.

        Args:
            names: Experts of this index.
            means: By module the mean input, (inputs,); other modules are skipped.
            bits: Bits per number: 8, 16 or 32; more than 8 need entries with full prototypes.
        """
        parts: dict[str, list[_Part]] = {}
        for modules, together in self.alike(names).items():
            entries = [self[name] for name in together]
            ends = list(accumulate(module.inputs for module in modules))
            for place, (module, end) in enumerate(zip(modules, ends, strict=True)):
                if module.name in means:
                    part = _Part(together, entries, place, slice(end - module.inputs, end), means[module.name].device)
                    parts.setdefault(module.name, []).append(part)
        return {
            module: Prototypes(
                experts=tuple(name for part in here for name in part.experts),
                parts=tuple(part.codes(bits) for part in here),
                mean_I=means[module],
                full=lambda here=here: tuple(part.full() for part in here),
            )
            for module, here in parts.items()
        }

    def __getitem__(self, name: str) -> IndexEntry:
        entry = self._entries[name]
        if isinstance(entry, Path):
            entry = self._entries[name] = IndexEntry.load(entry)
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Index({len(self)} experts)"
