"""Settings of an extraction, how much memory it needs, and the method that fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import ExtractionError, SpectrError, collecting, raise_together, range_faults
from spectr.extraction.architecture import Linear
from spectr.extraction.checkpoint import BLOCK
from spectr.extraction.svd import exact_bytes, randomised_bytes, sketch_width

GIB = 1 << 30
Method = Literal["auto", "exact", "randomised"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TITLE = "these settings cannot be used"
_NULL = 1e-6  # singular values below this share of the largest one are rounding of float32


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """How many singular directions of an update to keep.

    Attributes:
        rank: The same number in every module.
        energy: In each module the fewest directions with this share of the squared Frobenius norm, above 0 and at most
            1; 1 keeps all directions that are not zero.
        max_rank: With ``energy``, the largest rank of a module.

    Raises:
        ExtractionError: Not exactly one of ``rank`` and ``energy`` is given, or numbers are out of range; lists all
            faults.

    Source: Eckart and Young (1936): no other matrix of that rank is closer in the Frobenius norm.
    """

    rank: int | None = None
    energy: float | None = None
    max_rank: int = 128

    def __post_init__(self) -> None:
        faults: list[SpectrError] = []
        if (self.rank is None) == (self.energy is None):
            given = "neither rank nor energy was given" if self.rank is None else "both rank and energy were given"
            faults.append(ExtractionError(given, expected="one of the two", do="--rank 16, or --energy 0.9"))
        sizes = {"rank": self.rank, "max_rank": self.max_rank}
        faults += range_faults(ExtractionError, "1 or more", lambda n: n >= 1, **sizes)
        faults += range_faults(ExtractionError, "a share above 0 and up to 1", lambda e: 0 < e <= 1, energy=self.energy)
        raise_together(_TITLE, faults, ExtractionError)

    @property
    def most(self) -> int:
        """The largest rank that a module can get."""
        return self.max_rank if self.rank is None else self.rank

    def choose(self, S_R: Float[Tensor, " R"], total: float) -> int:
        """The rank for one module.

        Directions whose singular value is zero (up to float32 rounding) are never kept, except a single one.

        Args:
            S_R: Singular values, descending.
            total: The squared Frobenius norm of the whole update.
        """
        alive = int((_NULL * S_R[0] < S_R).sum())
        wanted = self.most
        if self.energy is not None and self.energy < 1:
            held_R = S_R.double().square().cumsum(0)
            wanted = min(wanted, int((held_R < self.energy * total).sum()) + 1)
        return max(1, min(wanted, alive))


@dataclass(frozen=True, kw_only=True)
class Extraction(Truncation):
    """Settings of :func:`spectr.extraction.extract`, ranks included.

    Attributes:
        method: ``exact`` computes each SVD completely; ``randomised`` only its first directions; ``auto`` is exact if
            that fits into the memory and the smaller side of the matrix is at most 2048, above which it takes minutes
            per module.
        oversampling: For the randomised SVD: number of additional directions that it computes.
        power_iterations: For the randomised SVD: passes that improve the result for a slowly decaying spectrum.
        seed: For the randomised SVD; each module's random numbers depend on it and on the module's name only.
        max_memory: Bytes that tensors may take at any time, Python and torch not counted (docs/howto/extraction.md).
        dtype: Dtype of the written factors: ``bfloat16`` or ``float32``.
        strict: Raise an error if anything changed that a LoRA expert cannot hold.
        called_only: Leave out layers whose weights the model uses without calling the layer, as Mamba's ``dt_proj``. An
            expert with such layers needs a router that chooses one expert for a whole prompt.

    Raises:
        ExtractionError: Settings are out of range; lists all of them.
    """

    method: Method = "auto"
    oversampling: int = 10
    power_iterations: int = 2
    seed: int = 0
    max_memory: int = 4 * GIB
    dtype: str = "bfloat16"
    strict: bool = False
    called_only: bool = False

    def __post_init__(self) -> None:
        faults: list[SpectrError] = []
        with collecting(faults):
            super().__post_init__()
        for name, known in (("method", get_args(Method)), ("dtype", tuple(DTYPES))):
            given = {name: getattr(self, name)}
            faults += range_faults(ExtractionError, " or ".join(known), known.__contains__, **given)
        counts = {name: getattr(self, name) for name in ("oversampling", "power_iterations", "seed")}
        faults += range_faults(ExtractionError, "0 or more", lambda n: n >= 0, **counts)
        memory = self.max_memory
        faults += range_faults(ExtractionError, "a number of bytes above 0", lambda n: n > 0, max_memory=memory)
        raise_together(_TITLE, faults, ExtractionError)


def shown_bytes(count: float) -> str:
    """A number of bytes for people: 12.3 MiB."""
    power = min(3, max(0, int(math.log(max(count, 1), 1024))))
    return f"{count / 1024**power:.1f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


EXACT_SIDE = 2048  # if both sides are larger, a full SVD takes minutes on a CPU
_FLOAT = 4
_READING = 8  # float32 blocks at most: both in their own dtype and in float32, the difference, its squares in float64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The method for each module, by its name, and the maximum size of tensors in bytes."""

    methods: Mapping[str, str]
    need: int


def plan(layers: Sequence[Linear], settings: Extraction, reading: Mapping[str, int] = MappingProxyType({})) -> Plan:
    """Choose a method for each module.

    A module needs its difference in float32, and the larger of what reading and the SVD need. All factors are kept
    until they are written (twice, since saving copies them).

    Args:
        layers: The modules.
        settings: Of the extraction.
        reading: By module, further bytes for reading it, if its tensors must be converted.

    Raises:
        ExtractionError: A module does not fit into ``max_memory``; names the one that needs most.
    """
    factors = _factors(layers, settings)
    needs = {layer.module: _by_method(layer, settings, reading.get(layer.module, 0)) for layer in layers}
    methods = {layer.module: _method(layer, needs[layer.module], factors, settings) for layer in layers}
    whole = {module: factors + needs[module][method] for module, method in methods.items()}
    most = max(whole, key=whole.__getitem__)
    if whole[most] > settings.max_memory:
        layer = next(layer for layer in layers if layer.module == most)
        raise _too_large(layer, methods[most], whole, factors, settings)
    return Plan(methods=methods, need=whole[most])


def _factors(layers: Iterable[Linear], settings: Extraction) -> int:
    """Bytes of all factors at the largest ranks that they can get."""
    most, size = settings.most, DTYPES[settings.dtype].itemsize
    return 2 * size * sum(min(most, o, i) * (o + i) for _, o, i, _ in layers)


def _by_method(layer: Linear, settings: Extraction, converted: int) -> dict[str, int]:
    _, outputs, inputs, _ = layer
    delta = _FLOAT * outputs * inputs
    reading = converted + _READING * min(delta, _FLOAT * max(BLOCK, outputs, inputs))
    width = sketch_width(outputs, inputs, settings.most, settings.oversampling)
    return {
        "exact": delta + max(reading, exact_bytes(outputs, inputs)),
        "randomised": delta + max(reading, randomised_bytes(outputs, inputs, width)),
    }


def _method(layer: Linear, needs: Mapping[str, int], factors: int, settings: Extraction) -> str:
    if settings.method != "auto":
        return settings.method
    fits = factors + needs["exact"] <= settings.max_memory
    small = min(layer.outputs, layer.inputs) <= EXACT_SIDE
    return "exact" if (fits and small) or needs["exact"] <= needs["randomised"] else "randomised"


def _too_large(
    layer: Linear, method: str, whole: Mapping[str, int], factors: int, settings: Extraction
) -> ExtractionError:
    others = sum(need > settings.max_memory for need in whole.values()) - 1
    need = whole[layer.module]
    return ExtractionError(
        f"{layer.module} ({layer.outputs} x {layer.inputs}) needs {shown_bytes(need)} of memory for the {method} SVD, "
        f"including {shown_bytes(factors)} for the factors of all modules"
        + (f"; {others} more modules do not fit" if others else ""),
        expected=f"at most {shown_bytes(settings.max_memory)}, the limit",
        do=f"use --max-memory {1.01 * need / (1 << 30):.3g} (GiB)"
        + (", or let --method auto choose" if method == "exact" else ", or use a lower rank"),
    )
