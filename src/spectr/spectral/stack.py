"""The experts of one module: each expert's share, and all of them in one pair of matrices.

Legend: O outputs, I inputs, R an expert's rank, E experts, P the sum of their ranks, Q rows of a shared input factor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectr.spectral.align import Aligned, align


class AlignedExpert(NamedTuple):
    """One expert at one module, float32: the SVD of its update, and the adapter's own factors ``delta = B A``.

    Attributes:
        aligned: ``delta = U S V^T``.
        A_RI: The adapter's ``A_t``.
        B_OR: The adapter's ``c B_t``, with the scale.
    """

    aligned: Aligned
    A_RI: Float[Tensor, "R I"]
    B_OR: Float[Tensor, "O R"]

    @staticmethod
    def of(A_RI: Float[Tensor, "R I"], B_OR: Float[Tensor, "O R"], scale: float) -> AlignedExpert:
        """From an adapter's factors."""
        return AlignedExpert(align(A_RI, B_OR, scale), A_RI.float(), B_OR.float() * scale)


class SideData(NamedTuple):
    """What a library knows about an expert at a module besides its factors; ``None`` if not requested.

    Attributes:
        mean_I: The module's mean input over the calibration's texts.
        rms: Root mean square of ``||A* (x - mean)||`` over these texts.
        gate_I: The expert's trained gate.
        norm: Mean and standard deviation of ``||A* x||`` over texts.
    """

    mean_I: Float[Tensor, " I"] | None = None
    rms: float | None = None
    gate_I: Float[Tensor, " I"] | None = None
    norm: tuple[float, float] | None = None


class Share(NamedTuple):
    """One expert's share of a stack, made by a router's ``init_expert``.

    Attributes:
        A: Input factor of the update ``B A``.
        B: Output factor.
        own: The router's other data for scores, as a named tuple. Each tensor has a row for the expert,
            or one for each row of ``A``, so that several experts can be concatenated.
        root: An input factor that others may share, with ``A = mix @ root``.
        mix: See ``root``.
        gain_O: For an update that also scales the layer's outputs: ``gain * (W x)`` is added.
        shift_O: For an update with a bias: it is added. Routers change neither.
        raw_A: The adapter's own ``A``, for a combination that merges these. Routers do not change it.
        raw_B: The adapter's own ``c B``, likewise.
    """

    A: Float[Tensor, "R I"]
    B: Float[Tensor, "O R"]
    own: tuple[Tensor, ...] = ()
    root: Float[Tensor, "Q I"] | None = None
    mix: Float[Tensor, "R Q"] | None = None
    gain_O: Float[Tensor, " O"] | None = None
    shift_O: Float[Tensor, " O"] | None = None
    raw_A: Float[Tensor, "R I"] | None = None
    raw_B: Float[Tensor, "O R"] | None = None

    @staticmethod
    def spectral(aligned: Aligned) -> Share:
        """``A* = S V^T`` and ``B* = U``, SpectR eq. 6."""
        return Share(aligned.S[:, None] * aligned.Vh, aligned.U)

    def to(self, device: torch.device, dtype: torch.dtype) -> Share:
        """The share on a device and in a dtype."""
        return self.mapped(lambda tensor: tensor.to(device, dtype))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Share:
        """The share with a function applied to its tensors."""
        rest = (None if tensor is None else change(tensor) for tensor in self[3:])
        return Share(change(self.A), change(self.B), remade(self.own, map(change, self.own)), *rest)


class Prepared(NamedTuple):
    """A :class:`Share` in the earlier protocol of routers."""

    A: Float[Tensor, "R I"]
    B: Float[Tensor, "O R"]
    prototype: Float[Tensor, " I"] | None = None

    @staticmethod
    def spectral(aligned: Aligned) -> Prepared:
        """See :meth:`Share.spectral`."""
        return Prepared(*Share.spectral(aligned)[:2])


def remade(own: tuple[Tensor, ...], tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Other tensors in the type of a router's own."""
    return type(own)(*tensors) if own else ()


@runtime_checkable
class State(Protocol):
    """The data of a module's experts that a router's ``scores`` reads."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The experts' ranks, in order."""
        ...

    @property
    def common_rank(self) -> int | None:
        """The rank of all experts; ``None`` if they differ."""

    @property
    def member_EP(self) -> Tensor:
        """One if row ``p`` belongs to expert ``e``, else zero."""
        ...

    @property
    def own(self) -> Any:
        """The router's own tensors, of all experts; see :attr:`Share.own`."""


@runtime_checkable
class InputState(State, Protocol):
    """A :class:`State` with input factors: a :class:`Stack`, or a layer's factors."""

    @property
    def A_PI(self) -> Tensor:
        """Input factors; if the experts share one, the shared one."""
        ...

    @property
    def mix_PR(self) -> Tensor | None:
        """The matrix that makes the experts' input factors from a shared one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Experts of one module, concatenated along P in alphabetical order. An :class:`InputState`.

    Attributes:
        experts: Their names.
        ranks: Their ranks. P is the sum.
        A_PI: Input factors, (P, I), or the one that all experts share, (Q, I). For a parameter that holds J
            matrices, all tensors of factors have one more axis, the first.
        B_OP: Output factors, (O, P).
        own: The router's own tensors, of all experts; see :attr:`Share.own`.
        mix_PR: Makes the experts' input factors from the shared one, (P, Q); ``None`` if none is shared.
        gain_EO: See :attr:`Share.gain_O`. Zero for experts without one; ``None`` if no expert has one.
        shift_EO: See :attr:`Share.shift_O`, likewise.
        raw_A_PI: See :attr:`Share.raw_A`, for experts of one rank; ``None`` if nothing merges them.
        raw_B_OP: See :attr:`Share.raw_B`, likewise.
    """

    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    A_PI: Float[Tensor, "*J _ I"]
    B_OP: Float[Tensor, "*J O P"]
    own: Any = ()
    mix_PR: Float[Tensor, "P Q"] | None = None
    gain_EO: Float[Tensor, "E O"] | None = None
    shift_EO: Float[Tensor, "E O"] | None = None
    raw_A_PI: Float[Tensor, "_ I"] | None = None
    raw_B_OP: Float[Tensor, "O _"] | None = None

    @staticmethod
    def of(shares: Mapping[str, Share]) -> Stack:
        """Stack experts by name, each with its own input factor. There must be at least one."""
        names = sorted(shares)
        parts = [shares[name] for name in names]
        return Stack(
            experts=tuple(names),
            ranks=tuple(part.A.shape[0] for part in parts),
            A_PI=torch.cat([part.A for part in parts]),
            B_OP=torch.cat([part.B for part in parts], dim=1),
            own=remade(parts[0].own, [torch.cat(each) for each in zip(*(part.own for part in parts), strict=True)]),
        )

    def with_outputs_of(self, shares: Mapping[str, Share]) -> Stack:
        """The stack with the parts of its shares that routers must not change, taken from the original shares."""
        parts = [shares[name] for name in self.experts]
        raw_A, raw_B = ([t for t in some if t is not None] for some in zip(*(part[-2:] for part in parts), strict=True))
        return replace(
            self,
            gain_EO=_rows([part.gain_O for part in parts], self.B_OP),
            shift_EO=_rows([part.shift_O for part in parts], self.B_OP),
            raw_A_PI=torch.cat(raw_A) if raw_A else None,
            raw_B_OP=torch.cat(raw_B, dim=1) if raw_B else None,
        )

    @property
    def owner_P(self) -> Int[Tensor, " P"]:
        """The number of the expert for each row of ``A_PI``."""
        return torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks, dtype=torch.long))

    @property
    def member_EP(self) -> Float[Tensor, "E P"]:
        """See :class:`State`."""
        return torch.nn.functional.one_hot(self.owner_P, len(self.ranks)).mT.contiguous().to(self.A_PI)

    @property
    def common_rank(self) -> int | None:
        """The rank of all experts, or ``None`` if they differ."""
        return self.ranks[0] if len(set(self.ranks)) == 1 else None

    def parts(self) -> dict[str, Share]:
        """The separate experts by name, each with its own input factor."""
        whole = self.A_PI if self.mix_PR is None else self.mix_PR @ self.A_PI
        A, B = whole.split(self.ranks), self.B_OP.split(self.ranks, dim=1)
        each = [own.split(1 if len(own) == len(self.experts) else self.ranks) for own in self.own]
        count = len(self.experts)
        owns = [remade(self.own, tensors) for tensors in zip(*each, strict=True)] or [()] * count
        gains, shifts = ([None] * count if rows is None else rows.unbind() for rows in (self.gain_EO, self.shift_EO))
        none = [None] * count
        raw_A = none if self.raw_A_PI is None else self.raw_A_PI.chunk(count)
        raw_B = none if self.raw_B_OP is None else self.raw_B_OP.chunk(count, dim=1)
        return dict(zip(self.experts, map(Share, A, B, owns, none, none, gains, shifts, raw_A, raw_B), strict=True))


def _rows(vectors: Sequence[Tensor | None], B_OP: Tensor) -> Tensor | None:
    """One row for each expert, zeros without a vector; ``None`` if all are zero."""
    if not any(vector is not None and bool(vector.any()) for vector in vectors):
        return None
    zeros_O = B_OP.new_zeros(len(B_OP))
    return torch.stack([zeros_O if vector is None else vector.to(zeros_O) for vector in vectors])


def segment_norms(h_TP: Float[Tensor, "*T P"], state: State) -> Float[Tensor, "*T E"]:
    """``||h_t||_2`` of each expert's part of ``h``, in float32 for any dtype of ``h`` except float64.

    Args:
        h_TP: The experts' parts, concatenated.
        state: Says which part belongs to which expert.
    """
    wide = torch.promote_types(h_TP.dtype, torch.float32)
    rank = state.common_rank
    if rank is None:
        return (h_TP.to(wide).square() @ state.member_EP.mT.to(wide)).sqrt()
    return norms(h_TP, len(state.ranks))


def norms(h_TP: Float[Tensor, "*T P"], experts: int) -> Float[Tensor, "*T E"]:
    """:func:`segment_norms` for experts of one rank."""
    wide = torch.promote_types(h_TP.dtype, torch.float32)
    return torch.linalg.vector_norm(h_TP.unflatten(-1, (experts, -1)), dim=-1, dtype=wide)
