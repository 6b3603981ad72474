"""The difference between a fine-tuned checkpoint and its base, and all that can be wrong with the two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import ExtractionError, raise_together, some_of
from spectr.extraction.architecture import Architecture, Linear
from spectr.extraction.checkpoint import Checkpoint, Piece, Rows, Source, find_sources

_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One parameter in both checkpoints.

    Attributes:
        name: Its name in transformers.
        parts: Its parts in the base and fine-tuned checkpoints: the whole, or the tensors that are joined into it.
        linear: The layer of this weight, if an expert can adapt it.
        kind: Its type otherwise.
    """

    name: str
    parts: tuple[tuple[Piece, Piece], ...]
    linear: Linear | None = None
    kind: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in both checkpoints; if tensors are joined, that of the first."""
        return self.parts[0][0].shape

    def memory(self, base: Checkpoint, tuned: Checkpoint) -> int:
        """Bytes in memory at a time in addition to blocks; see :meth:`spectr.extraction.checkpoint.Piece.memory`."""
        return max(old.memory(base) + new.memory(tuned) for old, new in self.parts)

    def blocks(self, base: Rows, tuned: Rows) -> Iterator[tuple[Tensor, Tensor]]:
        """Both, block by block."""
        for old, new in self.parts:
            yield from zip(old.blocks(base), new.blocks(tuned), strict=True)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a parameter moved: Frobenius norms of the difference and of the base's weight."""

    pair: Pair
    change: float
    size: float

    @property
    def relative(self) -> float | None:
        """``||d|| / ||W||``; ``None`` if W is zero."""
        return self.change / self.size if self.size else None


def pair_up(base: Checkpoint, tuned: Checkpoint, architecture: Architecture) -> tuple[Pair, ...]:
    """Match the tensors of two checkpoints, by their headers.

    A tied parameter that is not in the file is the parameter that it is tied to. Floating tensors that are not
    parameters of the architecture are compared if both checkpoints have them (weights of fused experts, or buffers).
    Tensors that only one has are left to :func:`unmatched`.

    Raises:
        ExtractionError: Sizes differ, a checkpoint lacks parameters, or dtypes are not plain floating-point types;
            lists all of them.
    """
    sources = [find_sources(architecture.model, checkpoint.tensors) for checkpoint in (base, tuned)]
    wanted = [*architecture.linear, *architecture.kinds]
    wanted = [name for name in wanted if name not in architecture.tied or any(name in found for found in sources)]
    strange = [name for name in sources[0] if name not in wanted and name in sources[1]]
    where = [{name: _find(name, found, architecture) for name in wanted + strange} for found in sources]
    pairs, unequal, odd = [], [], []
    for name in wanted + strange:
        ours, theirs = where[0][name], where[1][name]
        if ours is None or theirs is None:
            continue
        kinds = [_dtype(source, checkpoint) for source, checkpoint in ((ours, base), (theirs, tuned))]
        if not all(kind in _FLOATS for kind in kinds):
            odd += [] if name in strange else [f"{name} is {kinds[1]} (base: {kinds[0]})"]
            continue
        linear = architecture.linear.get(name)
        parts = _parts(name, ours, theirs, base, tuned, whole=linear is not None)
        unequal += [
            f"{name} is {_shape(new.shape)} (base: {_shape(old.shape)})" for old, new in parts if old.shape != new.shape
        ]
        kind = architecture.kinds.get(name, "no parameter of the architecture")
        pairs.append(Pair(name=name, parts=parts, linear=linear, kind=kind))
    faults = _faults(_lacking(where, (base, tuned), architecture), unequal, odd, pairs)
    raise_together("the two checkpoints do not fit together", faults, ExtractionError)
    return tuple(pairs)


def _dtype(source: Source, checkpoint: Checkpoint) -> str:
    """The dtype of a parameter's tensors: the first one that is not a plain floating dtype, if any."""
    kinds = [checkpoint.tensors[key].dtype for key in source.keys]
    return next((kind for kind in kinds if kind not in _FLOATS), kinds[0])


def _parts(
    name: str, ours: Source, theirs: Source, base: Checkpoint, tuned: Checkpoint, *, whole: bool
) -> tuple[tuple[Piece, Piece], ...]:
    """A parameter in both checkpoints: tensor by tensor where both join it alike and it is not needed as a whole."""
    if ours.convert and ours.pattern == theirs.pattern and not whole:
        return tuple(
            (Piece.tensor(name, old, base), Piece.tensor(name, new, tuned))
            for old, new in zip(ours.keys, theirs.keys, strict=True)
        )
    return ((Piece.of(name, ours, base), Piece.of(name, theirs, tuned)),)


def unmatched(base: Checkpoint, tuned: Checkpoint, architecture: Architecture) -> tuple[str, ...]:
    """Floating-point tensors that only the fine-tuned checkpoint has, such as the head of a reward model."""
    ours, theirs = (find_sources(architecture.model, checkpoint.tensors) for checkpoint in (base, tuned))
    return tuple(
        name
        for name, source in theirs.items()
        if _find(name, ours, architecture) is None and _dtype(source, tuned) in _FLOATS
    )


def measure(
    pairs: tuple[Pair, ...], base: Rows, tuned: Rows, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Difference, ...]:
    """The norms of all differences, read block by block and summed in float64.

    A tensor that equals the base's, rounded to the fine-tuned checkpoint's dtype, counts as unchanged.

    Raises:
        ExtractionError: A checkpoint contains NaN or infinite values; lists all such tensors.
    """
    found, faults = [], []
    for done, pair in enumerate(pairs, start=1):
        change, size, same = 0.0, 0.0, True
        for old, new in pair.blocks(base, tuned):
            size, change = size + _square(old), change + _square(new.float() - old.float())
            same = same and torch.equal(old.to(new.dtype), new)
        change = 0.0 if same and math.isfinite(size) else change
        if not (math.isfinite(change) and math.isfinite(size)):
            faults.append(f"{pair.name} ({'fine-tuned model' if math.isfinite(size) else 'base'})")
        found.append(Difference(pair=pair, change=math.sqrt(change), size=math.sqrt(size)))
        progress(done, len(pairs))
    if faults:
        raise ExtractionError(
            f"NaN or infinite values in {some_of(faults, _SHOWN)}",
            expected="finite weights",
            do="download or train it again",
        )
    return tuple(found)


def difference(pair: Pair, base: Rows, tuned: Rows) -> Float[Tensor, "O I"]:
    """``W_tuned - W_base`` of a linear layer as (outputs, inputs), float32, filled block by block."""
    assert pair.linear is not None
    delta = torch.empty(pair.shape, dtype=torch.float32)
    start = 0
    for old, new in pair.blocks(base, tuned):
        delta[start : start + len(new)] = new.float() - old.float()
        start += len(new)
    return delta.mT if pair.linear.transposed else delta


def _square(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def _find(name: str, found: Mapping[str, Source], architecture: Architecture) -> Source | None:
    """What a parameter is made of: its own, or that of a parameter it is tied to."""
    others = [architecture.tied.get(name), *(other for other, first in architecture.tied.items() if first == name)]
    return next((found[option] for option in (name, *others) if option in found), None)


def _lacking(
    where: Sequence[Mapping[str, Source | None]], checkpoints: Sequence[Checkpoint], architecture: Architecture
) -> list[list[str]]:
    """Parameters that each checkpoint lacks; of another class, such as a reward model's, those of the head may lack."""
    other = [checkpoint.model_class not in (None, architecture.model_class) for checkpoint in checkpoints]
    return [
        [name for name, source in found.items() if source is None and not (free and architecture.in_head(name))]
        for found, free in zip(where, other, strict=True)
    ]


def _faults(
    lacking: Sequence[list[str]], unequal: list[str], odd: list[str], pairs: list[Pair]
) -> Iterator[ExtractionError]:
    """Why two checkpoints do not fit together, from the findings of :func:`pair_up`."""
    for what, missing in zip(("base", "fine-tuned"), lacking, strict=True):
        if missing:
            yield ExtractionError(
                f"the {what} checkpoint lacks {some_of(missing, _SHOWN)}",
                expected="every parameter of the base's architecture in both checkpoints",
                do="check that the folder is complete, and that one model was fine-tuned from the other",
            )
    if unequal:
        vocabulary = all("embed" in name or "lm_head" in name or "wte" in name for name in unequal)
        yield ExtractionError(
            f"sizes differ: {some_of(unequal, _SHOWN)}",
            expected="a model that was fine-tuned from this base"
            + (", with the same vocabulary" if vocabulary else ""),
            do="resize the fine-tuned model's embeddings to the base's vocabulary and save it again"
            if vocabulary
            else "pass the base that it was fine-tuned from: --base",
        )
    if odd:
        yield ExtractionError(
            f"not plain floating-point tensors: {some_of(odd, _SHOWN)}",
            expected="F32, BF16, F16 or F64",
            do="dequantise the model, save it, and extract from the result",
        )
    stored = [(pair, pair.linear.stored) for pair in pairs if pair.linear]
    misfit = [f"{pair.name} is {_shape(pair.shape)} (there: {_shape(s)})" for pair, s in stored if pair.shape != s]
    if misfit:
        yield ExtractionError(
            f"the base's weights differ in size from its config.json: {some_of(misfit, _SHOWN)}",
            expected="configuration and weights of the same model",
            do="download or save the base again",
        )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
