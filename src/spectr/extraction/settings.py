"""Settings of an extraction: ranks, method and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import ExtractionError, SpectrError, collecting, raise_together, range_faults

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
