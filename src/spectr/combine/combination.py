"""The type of combinations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from spectr.library.needs import Need
from spectr.spectral import Stack


class Combination(NamedTuple):
    """How the updates of the chosen experts are combined.

    Attributes:
        merge: ``(h_TP, weights_TE, B_OP, owner_P) -> delta_TO``, pure, with ``h = A x`` of all experts.
        density: Share of the entries of an expert's output factor that is kept when the expert is prepared; see
            :func:`spectr.spectral.sparsify.drop`.
        prepare: Maps the stack of all experts of a module to the argument that replaces ``B_OP``, and one more tensor
            for ``merge``. It runs when the layer receives its experts. A token's result then also depends on experts
            that are not chosen. ``None``: ``merge`` receives ``B_OP``.
        needs: What the library must provide.
        is_sum: Whether the result is the weighted sum of the experts' updates.
        raw: Whether ``merge`` receives the adapters' own ``A_t x`` and ``c_t B_t`` instead of the router's ``h`` and
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
        """Whether a token's update depends on experts in memory that were not chosen."""
        return self.prepare is not None
