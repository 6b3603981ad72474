"""The first singular directions of a dense matrix: exactly, or with a much cheaper randomised method.

Shapes: O outputs, I inputs, R rank, Q directions that the randomised method computes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.spectral import Aligned
from spectr.spectral.precision import without_autocast

_FLOAT = 4  # bytes of a float32


def exact_svd(delta_OI: Float[Tensor, "O I"]) -> Aligned:
    """All singular directions, R = min(O, I). Float32 in, float32 out."""
    return Aligned(*torch.linalg.svd(delta_OI, full_matrices=False))


@without_autocast()
def randomised_svd(
    delta_OI: Float[Tensor, "O I"], rank: int, *, oversampling: int, power_iterations: int, seed: int
) -> Aligned:
    """Approximates the first ``rank`` singular directions: those of ``Q Q^T delta``.

    Q is an orthonormal basis of ``(delta delta^T)^p delta G`` with G Gaussian of ``rank + oversampling`` columns; a QR
    after every product keeps small directions from drowning in rounding. Then ``Q^T delta = u S V^T`` and ``U = Q u``.
    As Q is orthonormal, ``sum S^2`` is exactly what the result holds of ``||delta||^2``.

    Not ``torch.svd_lowrank``, which is the same algorithm but draws from torch's global random state.

    Args:
        delta_OI: The matrix, float32.
        rank: Directions wanted; there are never more than min(O, I).
        oversampling: Further columns of G.
        power_iterations: p above.
        seed: Of G.

    Returns:
        R = min(rank, O, I) directions, float32.

    Source: Halko, Martinsson and Tropp (2011), algorithms 4.4 and 5.1.
    """
    width = sketch_width(delta_OI.shape[0], delta_OI.shape[1], rank, oversampling)
    generator = torch.Generator().manual_seed(seed)
    G_IQ = torch.randn(delta_OI.shape[1], width, generator=generator, dtype=torch.float32)
    Q_OQ = torch.linalg.qr(delta_OI @ G_IQ).Q
    for _ in range(power_iterations):
        Z_IQ = torch.linalg.qr(delta_OI.mT @ Q_OQ).Q
        Q_OQ = torch.linalg.qr(delta_OI @ Z_IQ).Q
    u_QQ, S_Q, Vh_QI = torch.linalg.svd(Q_OQ.mT @ delta_OI, full_matrices=False)
    return Aligned(U=(Q_OQ @ u_QQ)[:, :rank], S=S_Q[:rank], Vh=Vh_QI[:rank])


def sketch_width(outputs: int, inputs: int, rank: int, oversampling: int) -> int:
    """Q, the columns of the randomised method's random matrix."""
    return min(rank + oversampling, outputs, inputs)


def exact_bytes(outputs: int, inputs: int) -> int:
    """What :func:`exact_svd` takes at most besides its input: copies, U, V^T, workspace of LAPACK's ``gesdd``."""
    short = min(outputs, inputs)
    return _FLOAT * (3 * outputs * inputs + 6 * short * short + 32 * (outputs + inputs))


def randomised_bytes(outputs: int, inputs: int, width: int) -> int:
    """What :func:`randomised_svd` takes at most in addition to its input, with Q = ``width``."""
    return _FLOAT * (4 * (outputs + inputs) * width + 8 * width * width + 32 * (outputs + inputs))
