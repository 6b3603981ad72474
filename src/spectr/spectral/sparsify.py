"""TIES and DARE, for merges into one adapter and for merges at each token.

Both make updates sparse. TIES keeps the largest entries (:func:`trim`) and lets the updates elect a sign for each entry
(:func:`elect_and_mean`). DARE keeps entries at random (:func:`drop`). A share of entries is always the ``density``:
what is kept. ``N`` is the axis of entries here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def trim(x_TN: Float[Tensor, "*T N"], density: float) -> Float[Tensor, "*T N"]:
    """Keep each row's ``k = max(1, floor(density * N))`` entries of largest magnitude, and set the others to zero.

    Entries that tie with the smallest kept entry are kept too, so that the result does not depend on their order.

    Args:
        x_TN: Updates, one in a row.
        density: Share of the entries, above 0, at most 1.

    Source: TIES-Merging (Yadav et al., 2023), section 4, "Trim", and Algorithm 1. It does not say how the number of
    entries is rounded. PEFT and mergekit take ``int(density * N)``, and so ``k`` is: 28 for 0.29 of 100.
    """
    entries = x_TN.shape[-1]
    kept = max(1, int(density * entries))
    if kept >= entries:
        return x_TN
    size_TN = x_TN.abs()
    smallest_T1 = size_TN.kthvalue(entries - kept + 1, dim=-1, keepdim=True).values
    return x_TN * (size_TN >= smallest_T1)


def elect_and_mean(
    updates: Sequence[Float[Tensor, "*T N"]], weights: Sequence[Float[Tensor, "*T 1"]] | None = None
) -> Float[Tensor, "*T N"]:
    """For each entry ``e = sgn(sum_t u_t)``, and the mean of those ``u_t`` whose sign is ``e``.

    Entries that are zero do not count. If the sum is exactly zero, no sign is elected, and the result is zero. The
    sign of zero is zero, no entry has it, and a merge of the negated updates stays the negated merge.

    Args:
        updates: At least one update, all of one shape, multiplied by their weights.
        weights: The mean is divided by the sum of the weights that agree, or by their number if ``None``.

    Source: TIES-Merging (Yadav et al., 2023), section 4, "Elect" and "Disjoint Merge", and Algorithm 1.
    """
    elected_TN = sum(updates[1:], start=updates[0]).sign()
    merged_TN, total_TN = torch.zeros_like(elected_TN), torch.zeros_like(elected_TN)
    for number, update_TN in enumerate(updates):
        agrees_TN = update_TN * elected_TN > 0
        merged_TN = merged_TN + update_TN * agrees_TN
        total_TN = total_TN + (agrees_TN if weights is None else weights[number] * agrees_TN)
    return merged_TN / torch.where(total_TN > 0, total_TN, 1)


def drop(x_MN: Float[Tensor, "M N"], density: float, *, seed: int, expert: str, module: str) -> Float[Tensor, "M N"]:
    """Divide each entry by ``density`` with that probability, else set it to zero. The mean is ``x``.

    Args:
        x_MN: Any matrix.
        density: ``1 - p`` with the paper's drop rate ``p``; above 0, at most 1.
        seed: Seed of the mask, which depends only on seed, expert and module, not on other experts.
        expert: The expert's name.
        module: The module's name.

    Source: DARE (Yu et al., 2024), "drop and rescale": drop with probability ``p``, multiply the rest by
    ``1 / (1 - p)``.
    """
    digest = hashlib.sha256("\0".join((str(seed), expert, module)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    mask_MN = torch.rand(x_MN.shape, generator=generator, dtype=torch.float32) < density
    return x_MN * mask_MN.to(x_MN.device) / density
