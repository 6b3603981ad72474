"""Rules that score experts by ``h = A x``, by the names under which they travel to kernels and graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

from spectr.spectral import norms


def lengths(h_TP: Float[Tensor, "*T P"], centers_P: Float[Tensor, " P"] | None, experts: int) -> Float[Tensor, "*T E"]:
    """``||h_t - center_t||``, float32: :class:`spectr.Spectr`, :class:`spectr.Calibrated` and :class:`spectr.Seqr`."""
    return norms(h_TP if centers_P is None else h_TP - centers_P, experts)


RULES: Mapping[str, Callable[[Tensor, Tensor | None, int], Tensor]] = {"lengths": lengths}
