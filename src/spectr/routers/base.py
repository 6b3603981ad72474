"""What a router is: three small axes (score, select, combine), prepared once.

All of these are interfaces; a router is a frozen dataclass that implements them and is its own configuration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from spectr.combine import Combination, get_combination
from spectr.errors import CompositionError
from spectr.library.library import ExpertLibrary
from spectr.library.needs import AtMost, Need, ProductsAlone
from spectr.routers.abstention import Abstain
from spectr.routers.settings import check_settings
from spectr.selection import Selection
from spectr.spectral import AlignedExpert, InputState, Share, SideData, Stack, State

if TYPE_CHECKING:
    from spectr.routers.policy import PromptPolicy

PROTOCOL = 2  # 1: prepare(aligned) and scores(x, norms, prototypes); see spectr.routers.version1


class Router(ABC):
    """The interface that composing, tracing and serving know.

    ``init_expert`` runs once for each expert and module, alone, so that an expert more or less changes nothing for the
    others; ``stack`` puts the shares together. ``scores`` runs for each token and is pure. What is not abstract here is
    what holds for most routers.

    Attributes:
        combine: How the chosen experts' updates become one; see :func:`spectr.combine.get_combination`.
        reads: What ``scores`` reads: the input ``x``, the products ``h = A* x``, both, or nothing.
        rule: The name of ``scores`` among :data:`spectr.ops.rules.RULES`, where it is one of them.
        abstain: Where it decides for whole prompts, the share of ordinary prompts that goes to an expert nonetheless;
            see :class:`spectr.routers.PromptPolicy`. ``"auto"``: as the library allows; ``None``: all prompts do.
    """

    combine: str = "outputs"
    reads: Literal["x", "h", "xh", ""] = "h"
    rule: str = ""
    abstain: Abstain = None

    def __post_init__(self) -> None:
        """Check the settings, as dataclasses do at the end of their construction."""
        check_settings(self)

    @property
    @abstractmethod
    def selection(self) -> Selection:
        """From scores to weights."""

    @property
    def combination(self) -> Combination:
        """From weights to an update."""
        return get_combination(self.combine)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the library has to bring."""
        k, combination = self.selection.k, self.combination
        alone = () if combination.is_sum else (ProductsAlone(self.combine),)
        return (*(() if k is None else (AtMost(k),)), *combination.needs, *alone)

    @property
    def policy(self) -> PromptPolicy | None:
        """What decides for whole prompts; ``None``: none is read before it is answered."""
        return None

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """One expert's share of a module's stack, float32; by default ``A*`` and ``B*`` alone.

        Args:
            expert: Its factors.
            side: What the library knows of it, as far as :attr:`needs` asks for that.
        """
        return Share.spectral(expert.aligned)

    def stack(self, shares: Mapping[str, Share]) -> Stack:
        """The experts of a module, from their shares by name."""
        return Stack.of(shares)

    def shares(self, stack: Stack) -> Mapping[str, Share]:
        """Shares that another stack can be made of; those that are missing have to be made anew."""
        return stack.parts()

    def inputs(self, state: InputState, x_TI: Float[Tensor, "*T I"]) -> Float[Tensor, "*T P"]:
        """``h = A*_t x`` of every expert."""
        return linear(x_TI, state.A_PI)

    @abstractmethod
    def scores(
        self,
        state: State,
        x_TI: Float[Tensor, "*T I"],
        h_TP: Float[Tensor, "*T P"],
        allowed_TE: Bool[Tensor, "*B E"] | None,
    ) -> Float[Tensor, "*T E"]:
        """Scores of all experts for each token, float32.

        Args:
            state: The experts of the module.
            x_TI: The module's input.
            h_TP: What :meth:`inputs` gives.
            allowed_TE: Those that may be chosen, for a row of tokens or for each token; all, if left out. Whoever calls
                this takes the others out of the result.
        """


class Lengths(NamedTuple):
    """Scores ``||A_t x - center_t||``, rows of ``A_t`` one expert after the other; no center is zero."""

    A_PI: Float[Tensor, "P I"]
    centers_P: Float[Tensor, " P"] | None = None


class LengthRouter(Router):
    """A router whose scores are lengths of vectors of the experts' ranks, which kernels and vLLM compute.

    A prompt's prior, where there is one, is multiplied with them.
    """

    rule = "lengths"

    @abstractmethod
    def lengths(self, state: InputState) -> Lengths:
        """The scores of :meth:`Router.scores` as lengths. Where experts share their input factor this is not asked."""


class ShortlistRouter(Router):
    """A router that scores only some experts for each token; the rest are not computed for it.

    Attributes:
        shortlist: How many are scored at most.
    """

    shortlist: int

    @abstractmethod
    def candidates(
        self, state: State, x_TI: Float[Tensor, "*T I"], allowed_TE: Bool[Tensor, "*B E"] | None = None
    ) -> Bool[Tensor, "*T E"]:
        """Which experts are scored for each token, as if there were none but those that are allowed."""

    @abstractmethod
    def listed_scores(
        self, state: State, h_TP: Float[Tensor, "*T P"], listed_TE: Bool[Tensor, "*T E"]
    ) -> Float[Tensor, "*T E"]:
        """The scores, where the candidates are known; ``h_TP`` of the others may be anything."""


def residents(router: Router, experts: Sequence[str]) -> tuple[str, ...]:
    """Those of a library's experts that the model has to hold.

    Raises:
        CompositionError: The router cannot work with these experts.
    """
    held = tuple(experts)
    for need in router.needs:
        held = need.resident(held)
    return held


def first_lack(router: Router, library: ExpertLibrary, names: Sequence[str]) -> tuple[Need, CompositionError] | None:
    """What a router needs and a library does not bring, with the error that says so; ``None`` where it brings all.

    Args:
        router: Names what it needs.
        library: All that there is.
        names: The experts of it that are to be used.

    Raises:
        LibraryError: Some experts have other weights by now than the library says.
    """
    for need in router.needs:
        try:
            need.check(library, names)
        except CompositionError as error:
            return need, error
    return None


def check_needs(router: Router, library: ExpertLibrary, names: Sequence[str]) -> None:
    """Raise :class:`CompositionError` unless a library brings all that a router needs; see :func:`first_lack`."""
    lack = first_lack(router, library, names)
    if lack is not None:
        raise lack[1]
