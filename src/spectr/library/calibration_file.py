"""Statistics of experts on calibration texts, in one safetensors file next to the experts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from torch import Tensor

from spectr.adapters import Expert
from spectr.atomic_write import replacing, save_readable
from spectr.errors import LibraryError
from spectr.hashing import known_sha256
from spectr.library.lock import locked_if_library

CALIBRATION_FILE = "calibration.safetensors"
_FORMAT = "3"
_NULL_NUMBERS = "null_numbers_by_weight"  # "null_numbers" were of evidence in which all modules count alike
_UNKNOWN = float("nan"), float("nan")
_READ = "2", _FORMAT  # format 2 has no null; format 1 used other kinds of texts


@contextmanager
def opened(path: Path, *formats: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a safetensors file and read the facts in its header. Raises for any fault, and for another format."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") not in formats:
            raise ValueError(f"format {metadata.get('format')!r} is not {' or '.join(map(repr, formats))}")
        yield file, json.loads(metadata["facts"])


class Norm(NamedTuple):
    """Mean and standard deviation of ``||A* x||`` over tokens, for one expert at one module."""

    mean: float
    deviation: float


class Statistics(NamedTuple):
    """One expert at one module: the mean input, and ``sqrt(mean ||A* (x - mean)||^2)`` over the texts' tokens.

    ``None`` for a module that no text reaches. ``norm`` is also ``None`` if an older version calibrated.
    """

    mean_I: Float[Tensor, " I"] | None
    rms: float | None
    norm: Norm | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Statistics of a base model's modules and a library's experts on texts without labels.

    Attributes:
        means: By module, the mean input over the counted tokens, float32, (inputs,).
        rms: By expert and module ``sqrt(mean ||A* (x - m)||^2)`` with ``A* = S V^T``.
        sha256: By expert, the hash of its weights; detects another expert under the same name.
        input_ids: The texts, (texts, tokens), int64, so that experts added later are measured on the same texts.
        counted: The tokens that the statistics count, (texts, tokens).
        real: The tokens that are not padding, (texts, tokens).
        settings: Base model, seed and other settings, for the record.
        null: Ordinary prompts that the base model wrote, apart from the texts: token ids without padding, including the
            chat template's. Evidence is compared with theirs. Empty if an older version calibrated.
        unmeasured: Modules that no text reaches, such as a vision tower's. Evidence for prompts ignores them.
        norms: By expert and module, mean and deviation of ``||A* x||``. Empty if an older version calibrated.
        own: The experts whose ``norms`` are of their own texts, with the number of these.
        null_experts: The experts that ``null_numbers`` are of, in alphabetical order.
        null_numbers: What the evidence of ``calibrated`` makes of the null when all of these are allowed, float32,
            (numbers, texts by length, experts). No process has to read the null again for them. ``None`` if that was
            not computed.
    """

    means: Mapping[str, Float[Tensor, " I"]]
    rms: Mapping[str, Mapping[str, float]]
    sha256: Mapping[str, str]
    input_ids: Int[Tensor, "N T"]
    counted: Bool[Tensor, "N T"]
    real: Bool[Tensor, "N T"]
    settings: Mapping[str, Any]
    null: Sequence[Sequence[int]] = ()
    unmeasured: frozenset[str] = frozenset()
    norms: Mapping[str, Mapping[str, Norm]] = field(default_factory=dict)
    own: Mapping[str, int] = field(default_factory=dict)
    null_experts: tuple[str, ...] = ()
    null_numbers: Float[Tensor, "Q K E"] | None = None

    @property
    def opening(self) -> tuple[int, ...]:
        """Token ids that the base model's chat template puts before a first user turn."""
        return tuple(self.settings.get("opening", ()))

    @property
    def turn(self) -> tuple[int, ...]:
        """Token ids that the chat template puts between an answer and the next user turn."""
        return tuple(self.settings.get("turn", ()))

    @property
    def closing(self) -> tuple[int, ...]:
        """Token ids that the chat template puts after a user's last turn, before the answer."""
        return tuple(self.settings.get("closing", ()))

    @cached_property
    def digest(self) -> str:
        """Identifies a set of texts: 16 hex digits."""
        marked = self.input_ids * self.counted * 2 + self.real
        return hashlib.sha256(marked.contiguous().numpy().tobytes()).hexdigest()[:16]

    @cached_property
    def said(self) -> Calibration:
        """Like :attr:`real`, without what the chat template writes after a user's words, which probes do not read."""
        counted, end = self.counted.clone(), list(self.closing)
        for row_T, ids_T, length in zip(counted, self.input_ids, self.real.sum(1).tolist(), strict=True):
            words = length - len(end)
            if ids_T[max(words, 0) : length].tolist() == end and row_T[: max(words, 0)].any():
                row_T[words:] = False
        return replace(self, counted=counted)

    def covers(self, expert: Expert) -> bool:
        """Whether exactly this expert, by its weights, was calibrated."""
        return expert.name in self.rms and self.sha256.get(expert.name) == known_sha256(expert.weights)

    def of(self, expert: str, module: str) -> Statistics:
        """The statistics of one expert at one module.

        Raises:
            LibraryError: They were measured with other module names or targets.
        """
        if module in self.unmeasured:
            return Statistics(None, None, None)
        if module not in self.rms[expert]:
            raise LibraryError(
                f"the calibration of '{expert}' does not cover {module}",
                expected="a calibration of the modules that the expert adapts in this model",
                do="calibrate again with this model: spectr library calibrate --fresh, or spectr.calibrate(..., "
                "fresh=True)",
            )
        return Statistics(self.means[module], self.rms[expert][module], self.norms.get(expert, {}).get(module))

    def joined(self, other: Calibration) -> Calibration:
        """This calibration plus the experts and modules of another one on the same texts."""
        return replace(
            self,
            means={**self.means, **other.means},
            rms={**self.rms, **other.rms},
            norms={**self.norms, **other.norms},
            sha256={**self.sha256, **other.sha256},
            unmeasured=self.unmeasured | other.unmeasured,
        )

    def save(self, folder: str | Path) -> Path:
        """Write the file into a library's folder, atomically."""
        modules, experts = sorted(self.means), sorted(self.rms)
        tensors = {f"mean/{module}": self.means[module].float().contiguous() for module in modules}
        for expert in experts:
            values = [self.rms[expert].get(module, float("nan")) for module in modules]
            tensors[f"rms/{expert}"] = torch.tensor(values, dtype=torch.float32)
            if expert in self.norms:
                pairs = [self.norms[expert].get(module, _UNKNOWN) for module in modules]
                tensors[f"norm/{expert}"] = torch.tensor(pairs, dtype=torch.float32)
        tensors |= {"input_ids": self.input_ids, "counted": self.counted, "real": self.real}
        tensors["null"] = torch.tensor([id for row in self.null for id in row], dtype=torch.int32)
        tensors["null_sizes"] = torch.tensor([len(row) for row in self.null], dtype=torch.int32)
        facts = {"settings": dict(self.settings), "sha256": dict(self.sha256), "unmeasured": sorted(self.unmeasured)}
        facts["own"] = dict(self.own)
        if self.null_numbers is not None:
            tensors[_NULL_NUMBERS], facts["null_experts"] = self.null_numbers, list(self.null_experts)
        target = Path(folder) / CALIBRATION_FILE
        metadata = {"format": _FORMAT, "facts": json.dumps(facts, sort_keys=True)}
        with locked_if_library(target.parent), replacing(target) as scratch:
            save_readable({key: tensor.contiguous() for key, tensor in tensors.items()}, scratch, metadata)
        return target

    @staticmethod
    def load(folder: str | Path) -> Calibration | None:
        """The calibration in a library's folder; ``None`` if there is none.

        Raises:
            LibraryError: The file is damaged or has another version.
        """
        path = Path(folder) / CALIBRATION_FILE
        if not path.is_file():
            return None
        try:
            with opened(path, *_READ) as (file, facts):
                tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        except Exception as error:  # safetensors raises its own types
            raise LibraryError(
                f"{path} cannot be read ({error})",
                expected="a calibration that this version can read",
                do=f"calibrate again: spectr library calibrate --library {folder} --fresh",
            ) from error
        means = {key.removeprefix("mean/"): tensor for key, tensor in tensors.items() if key.startswith("mean/")}
        modules = sorted(means)
        rms, pairs = (
            {
                key.removeprefix(start): dict(zip(modules, tensor.tolist(), strict=True))
                for key, tensor in tensors.items()
                if key.startswith(start)
            }
            for start in ("rms/", "norm/")
        )
        return Calibration(
            means=means,
            rms={name: {m: value for m, value in each.items() if not isnan(value)} for name, each in rms.items()},
            norms={
                name: {m: Norm(*two) for m, two in each.items() if not isnan(two[0])} for name, each in pairs.items()
            },
            own=facts.get("own", {}),
            sha256=facts["sha256"],
            input_ids=tensors["input_ids"],
            counted=tensors["counted"],
            real=tensors["real"],
            settings=facts["settings"],
            unmeasured=frozenset(facts.get("unmeasured", ())),
            null=[row.tolist() for row in tensors["null"].split(tensors["null_sizes"].tolist())]
            if "null" in tensors
            else (),
            null_experts=tuple(facts.get("null_experts", ())) if _NULL_NUMBERS in tensors else (),
            null_numbers=tensors.get(_NULL_NUMBERS),
        )
