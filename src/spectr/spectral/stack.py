"""The experts of one module in one pair of matrices, whatever their ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectr.spectral.align import Aligned


class Prepared(NamedTuple):
    """One expert's share of a stack: what a router's ``prepare`` made of its aligned factors."""

    A: Float[Tensor, "R I"]
    B: Float[Tensor, "O R"]
    prototype: Float[Tensor, " I"] | None = None

    @staticmethod
    def spectral(aligned: Aligned) -> Prepared:
        """``A* = S V^T`` and ``B* = U``, SpectR eq. 3."""
        return Prepared(aligned.S[:, None] * aligned.Vh, aligned.U)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Experts of one module, one after the other along P, in alphabetical order of their names.

    Attributes:
        experts: Their names.
        ranks: Their ranks; the P axis has their sum.
        A_PI: Input factors, (P, I).
        B_OP: Output factors, (O, P).
        prototypes_EI: One vector an expert, (E, I), where the router scores by those.
    """

    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    A_PI: Float[Tensor, "P I"]
    B_OP: Float[Tensor, "O P"]
    prototypes_EI: Float[Tensor, "E I"] | None = None

    @staticmethod
    def of(prepared: Mapping[str, Prepared]) -> Stack:
        """Stack experts by name; there must be at least one."""
        names = sorted(prepared)
        parts = [prepared[name] for name in names]
        prototypes = [part.prototype for part in parts if part.prototype is not None]
        return Stack(
            experts=tuple(names),
            ranks=tuple(part.A.shape[0] for part in parts),
            A_PI=torch.cat([part.A for part in parts]),
            B_OP=torch.cat([part.B for part in parts], dim=1),
            prototypes_EI=torch.stack(prototypes) if prototypes else None,
        )

    @property
    def owner_P(self) -> Int[Tensor, " P"]:
        """For each row of ``A_PI`` the number of its expert."""
        return torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks, dtype=torch.long))

    @property
    def common_rank(self) -> int | None:
        """The rank of all experts, ``None`` where they differ."""
        return self.ranks[0] if len(set(self.ranks)) == 1 else None

    def parts(self) -> dict[str, Prepared]:
        """The experts taken apart again, by name; views, not copies."""
        A, B = self.A_PI.split(self.ranks), self.B_OP.split(self.ranks, dim=1)
        prototypes = [None] * len(self.experts) if self.prototypes_EI is None else list(self.prototypes_EI)
        return {name: Prepared(a, b, v) for name, a, b, v in zip(self.experts, A, B, prototypes, strict=True)}

    def only(self, names: Iterable[str]) -> Stack | None:
        """The stack of those of its experts that are named; ``None`` where none is left."""
        kept = {name: part for name, part in self.parts().items() if name in set(names)}
        return Stack.of(kept) if kept else None

    def to(self, device: torch.device, dtype: torch.dtype) -> Stack:
        """The stack on a device and in a dtype."""
        prototypes = None if self.prototypes_EI is None else self.prototypes_EI.to(device, dtype)
        return Stack(
            experts=self.experts,
            ranks=self.ranks,
            A_PI=self.A_PI.to(device, dtype),
            B_OP=self.B_OP.to(device, dtype),
            prototypes_EI=prototypes,
        )
