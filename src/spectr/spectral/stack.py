"""The experts of one module in one pair of matrices, whatever their ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectr.spectral.align import Aligned


class Prepared(NamedTuple):
    """One expert's share of a stack: what a router's ``prepare`` made of its aligned factors.

    ``A = mix @ root`` where these are given: ``root`` is the adapter's own input factor, which others may share.
    """

    A: Float[Tensor, "R I"]
    B: Float[Tensor, "O R"]
    prototype: Float[Tensor, " I"] | None = None
    center: Float[Tensor, " R"] | None = None
    root: Float[Tensor, "Q I"] | None = None
    mix: Float[Tensor, "R Q"] | None = None

    @staticmethod
    def spectral(aligned: Aligned) -> Prepared:
        """``A* = S V^T`` and ``B* = U``, SpectR eq. 3."""
        return Prepared(aligned.S[:, None] * aligned.Vh, aligned.U)

    def calibrated(self, mean_I: Float[Tensor, " I"], rms: float) -> Prepared:
        """The same update with ``A / rms`` and ``B rms``, so that ``||A (x - m)||`` has the root mean square 1.

        ``A m`` is kept as ``center``. An expert that does nothing here (``rms`` 0) stays as it is.
        """
        scale = rms if rms > 0 else 1.0
        A = self.A / scale
        return self._replace(A=A, B=self.B * scale, center=A @ mean_I)

    def rooted(self, root: Float[Tensor, "Q I"], B_OQ: Float[Tensor, "O Q"]) -> Prepared:
        """The same update with ``A`` taken apart: ``A*_t = U^T c B_t A_t``, by the orthonormal columns of ``U``.

        Args:
            root: The adapter's ``A_t``.
            B_OQ: Its output factor with the scale, ``c B_t``.
        """
        return self._replace(root=root, mix=self.B.mT @ B_OQ)

    def gated(self, gate_I: Float[Tensor, " I"]) -> Prepared:
        """The same update with a trained gate as its prototype: ``LN(v)``, LayerNorm without affine."""
        return self._replace(prototype=torch.nn.functional.layer_norm(gate_I.float(), gate_I.shape))

    def to(self, device: torch.device, dtype: torch.dtype) -> Prepared:
        """The share on a device and in a dtype."""
        return Prepared(*(None if tensor is None else tensor.to(device, dtype) for tensor in self))  # pyright: ignore


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Experts of one module, one after the other along P, in alphabetical order of their names.

    Attributes:
        experts: Their names.
        ranks: Their ranks; the P axis has their sum.
        A_PI: Input factors, (P, I); where all experts share theirs, that one, (Q, I).
        B_OP: Output factors, (O, P).
        prototypes_EI: One vector an expert, (E, I), where the router scores by those.
        centers_P: ``A m`` of the mean input ``m``, where scores are calibrated.
        mix_PR: Makes the experts' input factors of the shared one, (P, Q); ``None`` where none is shared.
    """

    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    A_PI: Float[Tensor, "_ I"]
    B_OP: Float[Tensor, "O P"]
    prototypes_EI: Float[Tensor, "E I"] | None = None
    centers_P: Float[Tensor, " P"] | None = None
    mix_PR: Float[Tensor, "P Q"] | None = None

    @staticmethod
    def of(prepared: Mapping[str, Prepared]) -> Stack:
        """Stack experts by name; there must be at least one."""
        names = sorted(prepared)
        parts = [prepared[name] for name in names]
        prototypes = [part.prototype for part in parts if part.prototype is not None]
        centers = [part.center for part in parts if part.center is not None]
        root = _shared_root(parts)
        return Stack(
            experts=tuple(names),
            ranks=tuple(part.A.shape[0] for part in parts),
            A_PI=torch.cat([part.A for part in parts]) if root is None else root,
            B_OP=torch.cat([part.B for part in parts], dim=1),
            prototypes_EI=torch.stack(prototypes) if prototypes else None,
            centers_P=torch.cat(centers) if centers else None,
            mix_PR=None if root is None else torch.cat([part.mix for part in parts if part.mix is not None]),
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
        """The experts taken apart again, by name."""
        whole = self.A_PI if self.mix_PR is None else self.mix_PR @ self.A_PI
        A, B = whole.split(self.ranks), self.B_OP.split(self.ranks, dim=1)
        nothing = [None] * len(self.experts)
        roots = nothing if self.mix_PR is None else [self.A_PI] * len(self.experts)
        mixes = nothing if self.mix_PR is None else self.mix_PR.split(self.ranks)
        prototypes = nothing if self.prototypes_EI is None else list(self.prototypes_EI)
        centers = nothing if self.centers_P is None else self.centers_P.split(self.ranks)
        columns = zip(A, B, prototypes, centers, roots, mixes, strict=True)
        return dict(zip(self.experts, (Prepared(*share) for share in columns), strict=True))

    def only(self, names: Iterable[str]) -> Stack | None:
        """The stack of those of its experts that are named; ``None`` where none is left."""
        kept = {name: part for name, part in self.parts().items() if name in set(names)}
        return Stack.of(kept) if kept else None

    def to(self, device: torch.device, dtype: torch.dtype) -> Stack:
        """The stack on a device and in a dtype."""
        return Stack.of({name: part.to(device, dtype) for name, part in self.parts().items()})


def _shared_root(parts: Sequence[Prepared]) -> Tensor | None:
    """The input factor that all experts have in common, bit for bit; ``None`` where there is none, or one alone."""
    first = parts[0].root
    if first is None or len(parts) < 2:
        return None
    same = all(part.root is not None and torch.equal(part.root, first) for part in parts)
    return first if same else None
