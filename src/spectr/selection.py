"""From scores to weights: which experts are chosen, and with which weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.compiler import is_compiling

from spectr.errors import CompositionError
from spectr.lazy import lazy

_FEW = 16  # up to this many experts, a stable sort is faster than repairing ties
Weighting = Literal["uniform", "softmax"]


@runtime_checkable
class Selection(Protocol):
    """Turns a token's scores into weights. The weight of an expert that is not chosen is zero."""

    @property
    def k(self) -> int | None:
        """Number of experts that are chosen; ``None`` means all."""

    def __call__(self, scores_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T E"]:
        """Weights of the same shape as the float32 scores; they sum to one over the experts."""
        ...


@dataclass(frozen=True, kw_only=True)
class All:
    """All experts that adapt the layer, each with weight ``1 / E`` (mu-routing)."""

    @property
    def k(self) -> None:
        """See :class:`Selection`."""
        return None

    def __call__(self, scores_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T E"]:
        """See :class:`Selection`."""
        return torch.full_like(scores_TE, 1 / scores_TE.shape[-1])


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The ``k`` largest scores; the first of equal ones. If a layer has fewer experts, all of them.

    Example:
        >>> chosen, weights = TopK(k=2, weighting="uniform").choose(torch.tensor([[0.1, 0.9, 0.5]]))
        >>> chosen.tolist(), weights.tolist()
        ([[1, 2]], [[0.5, 0.5]])

    Attributes:
        k: Experts per token.
        weighting: ``"uniform"``: ``1 / k`` each. ``"softmax"``: the softmax of the chosen scores over ``temperature``.
        temperature: Temperature of the softmax, above zero.

    Source: SpectR eq. 9, and the remark below eq. 11; Arrow (Ostapenko et al., 2024) for the softmax.
    """

    k: int
    weighting: Weighting = "uniform"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise CompositionError(f"top_k={self.k}", expected="a whole number of at least 1")
        if self.weighting not in ("uniform", "softmax"):
            raise CompositionError(f"weights={self.weighting!r}", expected="'uniform' or 'softmax'")
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf):
            raise CompositionError(f"temperature={self.temperature}", expected="a finite number above zero")

    def choose(self, scores_TE: Float[Tensor, "*T E"]) -> tuple[Int[Tensor, "*T K"], Float[Tensor, "*T K"]]:
        """The chosen experts of each token, and their weights."""
        k = min(self.k, scores_TE.shape[-1])
        top_TK, index_TK = largest(scores_TE, k)
        if self.weighting == "softmax":
            return index_TK, (top_TK / self.temperature).softmax(-1)
        return index_TK, torch.full_like(top_TK, 1 / k)

    def __call__(self, scores_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T E"]:
        """See :class:`Selection`."""
        weights_TE = torch.zeros_like(scores_TE)
        if self.weighting == "uniform":  # one operation less; for a single token this matters
            k = min(self.k, scores_TE.shape[-1])
            return weights_TE.scatter_(-1, largest(scores_TE, k)[1], 1 / k)
        return weights_TE.scatter_(-1, *self.choose(scores_TE))


def select_among(
    selection: Selection, scores_TE: Float[Tensor, "*T E"], allowed_TE: Bool[Tensor, "*B E"]
) -> Float[Tensor, "*T E"]:
    """The weights that a selection gives if the library held only each token's allowed experts.

    If fewer than ``k`` are allowed, all of them are chosen; if none is, all weights are zero.
    """
    none_T1 = ~allowed_TE.any(-1, keepdim=True)  # a softmax of these would see only minus infinities
    weights_TE = selection(scores_TE.masked_fill(~allowed_TE, -torch.inf).masked_fill(none_T1, 0.0))
    weights_TE = weights_TE.where(allowed_TE, 0.0)  # a selection may have filled up with forbidden experts
    return weights_TE / weights_TE.sum(-1, keepdim=True).clamp(min=1e-30)


def is_captured() -> bool:
    """Whether the running code is being captured as a graph for other inputs: torch compiles, exports or traces."""
    return is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def largest(scores_TE: Float[Tensor, "*T E"], k: int) -> tuple[Float[Tensor, "*T K"], Int[Tensor, "*T K"]]:
    """The ``k`` largest scores and their positions; the first of equal ones. ``topk`` may return any of these."""
    if k == 1:
        return scores_TE.max(dim=-1, keepdim=True)
    if not scores_TE.is_cpu:  # avoids waiting for the device
        return _stably(scores_TE, k)
    best, count = scores_TE.topk(k, dim=-1), scores_TE.shape[-1]
    if k == count:
        return best
    least_T1 = best.values.narrow(-1, k - 1, 1)
    eager = type(scores_TE) is Tensor and not is_captured()
    if (
        eager and int((scores_TE >= least_T1).count_nonzero()) == best.values.numel()
    ):  # no other score equals a row's last
        return best
    if count <= _FEW:
        return _stably(scores_TE, k)
    tied_TE = scores_TE == least_T1
    room_T1 = k - (scores_TE > least_T1).sum(-1, keepdim=True)
    return scores_TE.masked_fill(tied_TE & (tied_TE.cumsum(-1) > room_T1), -math.inf).topk(k, dim=-1)


def _stably(scores_TE: Float[Tensor, "*T E"], k: int) -> tuple[Float[Tensor, "*T K"], Int[Tensor, "*T K"]]:
    sorted_TE, order_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
    return sorted_TE[..., :k], order_TE[..., :k]


__getattr__ = lazy(__name__, {}, renamed={"Everyone": "All"})
