"""Every merge written down slowly and plainly: dense float64 updates, one entry at a time. And experts to merge."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from models import random_factors, write_adapter
from spectr import ExpertLibrary
from spectr.merging import LowRank

Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"
SIZES = {Q: (32, 32), K: (32, 16), UP: (32, 48)}
# Experts of three ranks, that adapt different modules: what each leaves alone is zero.
EXPERTS = {"amber": (4, (Q, K, UP)), "blue": (3, (Q, UP)), "cyan": (6, (Q, K))}
ALPHA = {"amber": 8.0, "blue": 3.0, "cyan": 9.0}


def save_experts(root: Path) -> ExpertLibrary:
    """The experts, written by hand for the Llama of ``models.tiny_llama``."""
    for seed, (name, (rank, modules)) in enumerate(EXPERTS.items()):
        factors = {m: random_factors(rank, *SIZES[m], seed=10 * seed + i) for i, m in enumerate(modules)}
        write_adapter(root / name, factors, ALPHA[name], base_model_name_or_path="tiny", task_type="CAUSAL_LM")
    return ExpertLibrary.open(root)


def dense_of(library: ExpertLibrary, name: str) -> dict[str, Tensor]:
    """``scale * B @ A`` of every module that there is, float64; zeros where the expert has none."""
    deltas = {module: torch.zeros(outputs, inputs).double() for module, (inputs, outputs) in SIZES.items()}
    with library[name].open() as read:
        for module in library[name].shapes:
            A, B, scale = read(module)
            deltas[module] = scale * (B.double() @ A.double())
    return deltas


def low_rank(rank: int, inputs: int, outputs: int, seed: int) -> LowRank:
    """A random update."""
    A, B = random_factors(rank, inputs, outputs, seed)
    return LowRank(B, A)


def slow_sum(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """``sum_t w_t delta_t``."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + weight * delta
    return total


def slow_trim(delta: Tensor, density: float) -> Tensor:
    """The largest of the entries, the rest zero."""
    entries = sorted(delta.flatten().tolist(), key=abs, reverse=True)
    smallest = abs(entries[max(1, int(density * len(entries))) - 1])
    kept = [entry if abs(entry) >= smallest else 0.0 for entry in delta.flatten().tolist()]
    return torch.tensor(kept, dtype=torch.float64).reshape(delta.shape)


def slow_elect(deltas: list[Tensor]) -> Tensor:
    """Entry by entry: which sign has the larger sum, and the mean of the entries of that sign."""
    merged = []
    for entries in zip(*(delta.flatten().tolist() for delta in deltas), strict=True):
        total = sum(entries)
        agreeing = [entry for entry in entries if entry * total > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(deltas[0].shape)


def slow_ties(deltas: list[Tensor], weights: list[float], density: float, scale: float = 1.0) -> Tensor:
    """TIES of the weighted updates."""
    return scale * slow_elect([slow_trim(w * delta, density) for delta, w in zip(deltas, weights, strict=True)])


def slow_knots(deltas: list[Tensor], weights: list[float], density: float, scale: float = 1.0) -> Tensor:
    """TIES of the blocks of ``S V^T`` of one dense SVD of all weighted updates side by side."""
    side_by_side = torch.cat([w * delta for delta, w in zip(deltas, weights, strict=True)], dim=1)
    U, S, Vh = torch.linalg.svd(side_by_side, full_matrices=False)
    alive = 1e-6 * S[0] < S
    U, S, Vh = U[:, alive], S[alive], Vh[alive]
    Vh[Vh.abs() < 1e-12] = 0  # rounding, which would have a vote
    blocks = torch.chunk(S[:, None] * Vh, len(deltas), dim=1)
    return scale * (U @ slow_elect([slow_trim(block, density) for block in blocks]))


def slow_cut(delta: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, by a dense SVD."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] @ (S[:rank, None] * Vh[:rank])
