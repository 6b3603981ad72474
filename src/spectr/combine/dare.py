"""DARE: a random part of an expert's output factor is dropped once, the rest is enlarged to make up for it."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def drop(B_OR: Float[Tensor, "O R"], rate: float, key: str) -> Float[Tensor, "O R"]:
    """``B`` with each entry zero with probability ``rate``, and divided by ``1 - rate`` elsewhere.

    The mean over masks is ``B`` itself, and so for what the expert adds to any token. The mask depends on ``key`` (the
    module and the expert's name) alone, so that other experts in the library change nothing.

    Args:
        B_OR: An expert's output factor.
        rate: From 0 to below 1.
        key: Seeds the mask.

    Source: DARE (Yu et al., 2024), on the factor that SpectR's section 3.3 merges.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    kept_OR = torch.rand(B_OR.shape, generator=generator) >= rate
    return B_OR * (kept_OR / (1 - rate)).to(B_OR)
