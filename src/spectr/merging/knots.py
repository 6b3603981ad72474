"""KnOTS: merge in the space that the SVD of all concatenated updates defines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from spectr.errors import MergeError
from spectr.merging.lowrank import LowRank
from spectr.merging.method import Site, check_settings, ones
from spectr.merging.ties import ties_of
from spectr.spectral.align import left_basis, without_rounding


@dataclass(frozen=True, kw_only=True)
class Knots:
    """``[delta_1 ... delta_E] = U S [V_1^T ... V_E^T]``, then ``delta = U * merge(S V_t^T)``.

    Exact in factors, with at most the sum of the ranks. The SVD is computed from QR decompositions of the experts'
    factors and a small matrix; ``U`` and the merged ``S V^T`` are the factors of the result. The signs of the singular
    vectors do not matter, since TIES elects signs for each entry. ``inner="average"`` equals :class:`Average`.

    Attributes:
        inner: How the ``S V_t^T`` are merged: by TIES or by their mean.
        density: Share of the entries that TIES keeps.
        scale: Scale of the result.

    Source: KnOTS (Stoica et al., 2024), section 4. ``S`` goes with the ``V_t`` as in the authors' code, and so does the
    density: their configuration for LoRA experts of Llama-3-8B trims nothing (with a scale of 0.5, found by search).
    """

    name: ClassVar[str] = "knots"
    inner: Literal["ties", "average"] = "ties"
    density: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, density=self.density, scale=self.scale)
        if self.inner not in ("ties", "average"):
            raise MergeError(f"method 'knots' with inner={self.inner!r}", expected="'ties' or 'average'")

    def weights(self, given: Sequence[float] | None, count: int) -> tuple[float, ...]:
        """See :class:`spectr.merging.Method`; by default 1 each."""
        return ones(given, count)

    def merge(self, deltas: Sequence[LowRank], site: Site) -> LowRank:
        """See :class:`spectr.merging.Method`."""
        U, S = left_basis((delta.A, delta.B) for delta in deltas)
        if not U.shape[1]:
            return LowRank.zero(U.shape[0], deltas[0].A.shape[1])
        # S V_t^T = U^T delta_t, which is exactly zero for an expert that does not adapt the module.
        parts = [without_rounding((U.mT @ delta.B) @ delta.A, S[0]) for delta in deltas]
        merged = ties_of(parts, self.density) if self.inner == "ties" else torch.stack(parts).mean(0)
        return LowRank(U, self.scale * merged)
