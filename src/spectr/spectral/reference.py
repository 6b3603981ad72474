"""The equations in plain form, one token and one expert at a time, for comparison in tests.

The package does not use this module. Every function takes dense updates ``delta_t`` of shape (O, I) and a token ``x``
of shape (I,), all float64, and forms everything in full.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense_svd(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U, S, V^T`` of a dense update, cut to ``rank``; signs by the largest entry of each row of ``V^T``."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    U, S, Vh = U[:, :rank].clone(), S[:rank], Vh[:rank].clone()
    for r in range(len(S)):
        if Vh[r, Vh[r].abs().argmax()] < 0:
            Vh[r], U[:, r] = -Vh[r], -U[:, r]
    return U, S, Vh


def spectral_score(delta: Tensor, x: Tensor, rank: int) -> float:
    """``||S V^T x||``, SpectR eq. 7 and 8."""
    _, S, Vh = dense_svd(delta, rank)
    return float((S * (Vh @ x)).norm())


def projection_score(delta: Tensor, x: Tensor, rank: int) -> float:
    """``||V^T x||``, as the authors' released code scores."""
    _, _, Vh = dense_svd(delta, rank)
    return float((Vh @ x).norm())


def arrow_score(delta: Tensor, x: Tensor) -> float:
    """``|v . x|`` with the top right singular vector ``v``, SpectR eq. 4 and 5."""
    _, _, Vh = dense_svd(delta, 1)
    return float((Vh[0] @ x).abs())


def gate_score(gate: Tensor, x: Tensor) -> float:
    """``LN(x) . LN(v) / sqrt(I)`` with LayerNorm without affine, PHATGOOSE (Muqeeth et al., 2024)."""

    def normed(y: Tensor) -> Tensor:
        return (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()

    return float(normed(x) @ normed(gate)) / math.sqrt(len(x))


def shortlisted(deltas: list[Tensor], x: Tensor, count: int, ranks: list[int]) -> list[float]:
    """LAG: spectral scores of the ``count`` experts with the largest Arrow scores, minus infinity for the rest."""
    first = top_k([arrow_score(delta, x) for delta in deltas], count)
    pairs = enumerate(zip(deltas, ranks, strict=True))
    return [spectral_score(delta, x, rank) if i in first else -math.inf for i, (delta, rank) in pairs]


def calibrated_score(delta: Tensor, x: Tensor, texts: list[Tensor]) -> float:
    """``||delta (x - m)|| / sqrt(mean ||delta (y - m)||^2)`` with ``m`` the mean of the calibration inputs ``y``."""
    mean = torch.stack(texts).mean(0)
    squares = [float((delta @ (y - mean)).norm()) ** 2 for y in texts]
    return float((delta @ (x - mean)).norm()) / (sum(squares) / len(squares)) ** 0.5


def normalised_score(delta: Tensor, x: Tensor, texts: list[Tensor]) -> float:
    """``||delta x||`` minus its mean over the inputs ``y``, over its standard deviation, SEQR."""
    sizes = [float((delta @ y).norm()) for y in texts]
    mean = sum(sizes) / len(sizes)
    return (float((delta @ x).norm()) - mean) / (sum((size - mean) ** 2 for size in sizes) / len(sizes)) ** 0.5


def log_power_mean(values: list[float], power: float) -> float:
    """``log (mean v^p)^(1/p)``."""
    return math.log(sum(value**power for value in values) / len(values)) / power


def relative_scores(scores: list[float]) -> list[float]:
    """All experts' scores of one token over their geometric mean."""
    level = math.exp(sum(map(math.log, scores)) / len(scores))
    return [score / level for score in scores]


def standardised(value: float, null: list[float]) -> float:
    """A value minus the null's mean, divided by its standard deviation."""
    mean = sum(null) / len(null)
    return (value - mean) / (sum((other - mean) ** 2 for other in null) / (len(null) - 1)) ** 0.5


def top_k(scores: list[float], k: int) -> list[int]:
    """The indices of the ``k`` largest scores, SpectR eq. 9."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def uniform_weights(scores: list[float], k: int) -> list[float]:
    """``1 / k`` for the chosen, 0 for the rest."""
    chosen = top_k(scores, k)
    return [1 / len(chosen) if i in chosen else 0.0 for i in range(len(scores))]


def softmax_weights(scores: list[float], k: int, temperature: float) -> list[float]:
    """Softmax of the chosen scores over the temperature, 0 for the rest."""
    chosen = top_k(scores, k)
    top = max(scores[i] for i in chosen)
    powers = {i: torch.exp(torch.tensor((scores[i] - top) / temperature, dtype=torch.float64)).item() for i in chosen}
    total = sum(powers.values())
    return [powers[i] / total if i in chosen else 0.0 for i in range(len(scores))]


def merge_outputs(deltas: list[Tensor], weights: list[float], x: Tensor) -> Tensor:
    """``sum_t w_t delta_t x``, SpectR eq. 13."""
    out = torch.zeros(deltas[0].shape[0], dtype=x.dtype)
    for delta, weight in zip(deltas, weights, strict=True):
        out = out + weight * (delta @ x)
    return out


def merge_factors(A: list[Tensor], B: list[Tensor], weights: list[float], x: Tensor) -> Tensor:
    """``(sum_t w_t B_t) (sum_t w_t A_t x)``, SpectR eq. 10 to 12."""
    merged_B = torch.zeros_like(B[0])
    merged_h = torch.zeros(A[0].shape[0], dtype=x.dtype)
    for A_t, B_t, weight in zip(A, B, weights, strict=True):
        merged_B = merged_B + weight * B_t
        merged_h = merged_h + weight * (A_t @ x)
    return merged_B @ merged_h


def merge_ties(deltas: list[Tensor], weights: list[float], x: Tensor, density: float) -> Tensor:
    """TIES, entry by entry, of what each expert with a weight adds to one token."""
    return _ties([delta @ x for delta in deltas], weights, density)


def merge_knots(deltas: list[Tensor], weights: list[float], x: Tensor, density: float) -> Tensor:
    """TIES of the coordinates in the left singular vectors of all experts' dense updates side by side."""
    U, S, _ = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    U = U[:, 1e-6 * S[0] < S]
    return U @ _ties([U.T @ (delta @ x) for delta in deltas], weights, density)


def _ties(updates: list[Tensor], weights: list[float], density: float) -> Tensor:
    size = len(updates[0])
    kept = max(1, math.floor(density * size))
    trimmed = []
    for update in updates:
        largest = sorted(range(size), key=lambda i, u=update: -abs(float(u[i])))[:kept]
        trimmed.append([float(update[i]) if i in largest else 0.0 for i in range(size)])
    out = torch.zeros_like(updates[0])
    for i in range(size):
        votes = [(weight * update[i], weight) for update, weight in zip(trimmed, weights, strict=True)]
        total = sum(vote for vote, _ in votes)
        agreeing = [(vote, weight) for vote, weight in votes if vote * total > 0]
        if agreeing:
            out[i] = sum(vote for vote, _ in agreeing) / sum(weight for _, weight in agreeing)
    return out
