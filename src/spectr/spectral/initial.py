"""Initial factors that PEFT computes from a base weight and subtracts from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class InitialFactors(NamedTuple):
    """``B A`` is the part that is subtracted from the weight."""

    A_RI: Float[Tensor, "R I"]
    B_OR: Float[Tensor, "O R"]


def pissa_factors(W_OI: Float[Tensor, "O I"], rank: int) -> InitialFactors:
    """``B A = U_r S_r V_r^T``, the largest part of the SVD of the weight, each factor with the root of ``S``.

    Args:
        W_OI: The weight, float32.
        rank: r.

    Source: PiSSA (Meng et al., 2024), eq. 2 and 3; PEFT's ``LoraLayer.pissa_init``.
    """
    U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
    root_R = S[:rank].sqrt()
    return InitialFactors(root_R[:, None] * Vh[:rank], U[:, :rank] * root_R)


def olora_factors(W_OI: Float[Tensor, "O I"], rank: int) -> InitialFactors:
    """``B = Q_r`` and ``A = R_r``, the first columns and rows of the QR decomposition of the weight.

    Args:
        W_OI: The weight, float32.
        rank: r.

    Source: OLoRA (Büyükakyüz, 2024), section 3; PEFT's ``LoraLayer.olora_init``, which subtracts ``scale B A``.
    """
    Q, R = torch.linalg.qr(W_OI)
    return InitialFactors(R[:rank].contiguous(), Q[:, :rank].contiguous())
