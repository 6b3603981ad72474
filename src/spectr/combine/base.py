"""What a combination is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from spectr.library.needs import Need
from spectr.spectral import Stack


class Combination(NamedTuple):
    """How the chosen experts' updates become one.

    Attributes:
        merge: ``(h_TP, weights_TE, B_OP, owner_P) -> delta_TO``, pure, with ``h = A x`` of all experts.
        density: Share of the entries of an expert's output factor that stay when it is prepared; see
            :func:`spectr.spectral.sparsify.drop`.
        prepare: Makes, of the stack of all experts of a module, what ``merge`` gets in place of ``B_OP`` and one more
            tensor for it. It runs when the layer gets its experts, and a token's result then depends on experts that
            were not chosen too. ``None``: ``merge`` gets ``B_OP``.
        needs: What the library has to bring.
        is_sum: Whether the update is the weighted sum of the experts' own, unchanged.
        raw: Whether ``merge`` gets the adapters' own ``A_t x`` and ``c_t B_t`` in place of the router's ``h`` and
            ``B_OP``.
    """

    merge: Callable[..., Tensor]
    density: float = 1.0
    prepare: Callable[[Stack], tuple[Tensor, Tensor]] | None = None
    needs: tuple[Need, ...] = ()
    is_sum: bool = False
    raw: bool = False

    @property
    def depends_on_residents(self) -> bool:
        """Whether what a token gets depends on experts in memory that were not chosen."""
        return self.prepare is not None
