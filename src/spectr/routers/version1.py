"""Adapt routers of the first protocol (``prepare(aligned)``, ``scores(x, norms, prototypes)``) to the second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import layer_norm

from spectr.errors import CompositionError
from spectr.library.needs import CALIBRATED, GATED, Need
from spectr.routers.router import PROTOCOL, Router
from spectr.selection import All, Selection, TopK
from spectr.spectral import AlignedExpert, Share, SideData, State, segment_norms

_FIRST = ("prepare", "scores")
_MORE = ("candidates", "level", "resident")  # members of the first protocol that cannot be adapted


class OldState(NamedTuple):
    """A vector of each expert (width 0 if there is none), and what is subtracted from ``A x`` before scoring."""

    prototypes_EI: Float[Tensor, "E _"]
    centers_P: Float[Tensor, " P"]


@dataclass(frozen=True)
class VersionOne(Router):
    """A router of the first protocol that scores every expert for each token.

    Attributes:
        router: The router.
    """

    reads = "xh"

    router: Any

    @property
    def combine(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See :class:`Router`."""
        return self._declared("combine", "outputs")

    @property
    def selection(self) -> Selection:
        """See :class:`Router`."""
        k = self._declared("top_k", None)
        if k is None:
            return All()
        return TopK(k=k, weighting=self._declared("weights", "uniform"), temperature=self._declared("temperature", 1.0))

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`: from its attributes ``calibrated`` and ``gated``."""
        flags = {"calibrated": CALIBRATED, "gated": GATED}
        return (*super().needs, *(need for flag, need in flags.items() if self._declared(flag, False)))

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`."""
        A, B, prototype = self.router.prepare(expert.aligned)
        center = A.new_zeros(len(A))
        if side.mean_I is not None:
            rms = side.rms or 1.0
            A, B = A / rms, B * rms
            center = A @ side.mean_I
        if side.gate_I is not None:
            prototype = layer_norm(side.gate_I.float(), side.gate_I.shape)
        own = OldState(A.new_zeros(1, 0) if prototype is None else prototype[None], center)
        return Share(A, B, own)

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Float[Tensor, "*T P"], allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`."""
        prototypes_EI, centers_P = state.own
        norms_TE = segment_norms(h_TP - centers_P, state)
        return self.router.scores(x_TI, norms_TE, prototypes_EI if prototypes_EI.numel() else None)

    def _declared(self, name: str, default: Any) -> Any:
        return getattr(self.router, name, default)


def adapted(router: Any) -> Any:
    """Return a router, adapted if it implements the first protocol.

    Raises:
        CompositionError: It implements the first protocol, and does more than score every expert for each token.
    """
    ours = isinstance(router, Router) and router.selection is not None  # which the first protocol did not have
    if isinstance(router, type) or ours or not all(callable(getattr(router, name, None)) for name in _FIRST):
        return router
    more = [name for name in _MORE if getattr(router, name, None) is not None]
    if more:
        raise CompositionError(
            f"{router!r} implements the first protocol of routers, with {', '.join(more)}",
            expected=f"protocol {PROTOCOL}: a class that implements spectr.routers.Router",
            do="update its package; see CONTRIBUTING.md",
        )
    return VersionOne(router)


def adapted_maker(make: Callable[..., Any]) -> Callable[..., Any]:
    """A maker of routers for a package that declares no version; adapts routers of the first protocol."""
    if isinstance(make, type) and issubclass(make, Router) and not hasattr(make, "prepare"):
        return make

    @wraps(make, updated=())
    def made(**options: Any) -> Any:
        return adapted(make(**options))

    return made
