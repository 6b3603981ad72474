"""The interface of routers: three parts (score, select, combine), prepared once.

All classes here are interfaces. A router is a frozen dataclass that implements them and is its own configuration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from spectr.combine import Combination, get_combination
from spectr.errors import CompositionError
from spectr.library.library import ExpertLibrary
from spectr.library.needs import AtMost, Need, ProductsAlone
from spectr.routers.abstention import Abstain
from spectr.routers.setting_checks import check_settings
from spectr.selection import Selection
from spectr.spectral import AlignedExpert, InputState, Share, SideData, Stack, State

if TYPE_CHECKING:
    from spectr.routers.policy import PromptPolicy

PROTOCOL = 2  # 1: prepare(aligned) and scores(x, norms, prototypes); see spectr.routers.version1


class Router(ABC):
    """The interface that composition, tracing and serving use.

    ``init_expert`` runs once for each expert and module, independently, so that adding or removing an expert changes
    no other. ``stack`` joins the shares. ``scores`` runs for each token and is pure. Methods that are not abstract fit
    most routers.

    Attributes:
        combine: How the chosen experts' updates are combined; see :func:`spectr.combine.get_combination`.
        reads: The inputs of ``scores``: the input ``x``, the products ``h = A* x``, both, or nothing.
        signed: Whether scores may be below zero.
        rule: The name of ``scores`` in :data:`spectr.ops.rules.RULES`, if it is one of them.
        abstain: For decisions on whole prompts, the share of ordinary prompts that an expert may answer; see
            :class:`spectr.routers.PromptPolicy`. ``"auto"``: as the library allows; ``None``: experts answer all.
    """

    combine: str = "outputs"
    reads: Literal["x", "h", "xh", ""] = "h"
    signed: bool = False
    rule: str = ""
    abstain: Abstain = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Let classes of the first protocol be made, so that they are adapted, or refused by name."""
        super().__init_subclass__(**options)
        if hasattr(cls, "prepare"):
            for name in {name for base in cls.__bases__ for name in getattr(base, "__abstractmethods__", ())}:
                if getattr(getattr(cls, name), "__isabstractmethod__", False):
                    setattr(cls, name, None)

    def __post_init__(self) -> None:
        """Check the settings; dataclasses call this at the end of their construction."""
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
        """What the library must provide."""
        k, combination = self.selection.k, self.combination
        alone = () if combination.is_sum else (ProductsAlone(self.combine),)
        return (*(() if k is None else (AtMost(k),)), *combination.needs, *alone)

    @property
    def policy(self) -> PromptPolicy | None:
        """The policy for whole prompts; ``None`` if the router reads no prompt first."""
        return None

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """One expert's share of a module's stack, float32; by default only ``A*`` and ``B*``.

        Args:
            expert: Its factors.
            side: The library's data about it, if :attr:`needs` requests it.
        """
        return Share.spectral(expert.aligned)

    def stack(self, shares: Mapping[str, Share]) -> Stack:
        """The experts of a module, from their shares by name."""
        return Stack.of(shares)

    def shares(self, stack: Stack) -> Mapping[str, Share]:
        """Shares for building another stack; missing ones must be computed again."""
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
            h_TP: The result of :meth:`inputs`.
            allowed_TE: The experts that may be chosen, for a row of tokens or for each token; by default all. The
                caller removes the others from the result.
        """


class Lengths(NamedTuple):
    """Scores ``||A_t x - center_t||``, rows of ``A_t`` by expert; no center is zero."""

    A_PI: Float[Tensor, "P I"]
    centers_P: Float[Tensor, " P"] | None = None


class LengthRouter(Router):
    """A router whose scores are lengths of vectors of the experts' ranks; kernels and vLLM can compute them.

    A prompt's prior is multiplied with them.
    """

    rule = "lengths"

    @abstractmethod
    def lengths(self, state: InputState) -> Lengths:
        """The scores of :meth:`Router.scores` as lengths. Not called if experts share their input factor."""


class ShortlistRouter(Router):
    """A router that scores only some experts for each token; the others are not computed.

    Attributes:
        shortlist: Number of experts that are scored at most.
    """

    shortlist: int

    @abstractmethod
    def candidates(
        self, state: State, x_TI: Float[Tensor, "*T I"], allowed_TE: Bool[Tensor, "*B E"] | None = None
    ) -> Bool[Tensor, "*T E"]:
        """The experts that are scored for each token, as if only allowed ones existed."""

    @abstractmethod
    def listed_scores(
        self, state: State, h_TP: Float[Tensor, "*T P"], listed_TE: Bool[Tensor, "*T E"]
    ) -> Float[Tensor, "*T E"]:
        """The scores for known candidates; values of ``h_TP`` for other experts are ignored."""


def takes_one(router: Router) -> bool:
    """Whether every prompt has one expert at most, as a whole."""
    policy = router.policy
    return policy is not None and policy.use.most == 1 and not policy.pages


def residents(router: Router, experts: Sequence[str]) -> tuple[str, ...]:
    """The experts of a library that the model must hold.

    Raises:
        CompositionError: The router cannot work with these experts.
    """
    names = tuple(experts)
    for need in router.needs:
        names = need.resident(names)
    return names


def first_lack(router: Router, library: ExpertLibrary, names: Sequence[str]) -> tuple[Need, CompositionError] | None:
    """The first requirement of a router that a library does not meet, with its error; ``None`` if it meets all.

    Args:
        router: Declares its needs.
        library: The library.
        names: The experts that will be used.

    Raises:
        LibraryError: The weights of some experts changed since they were added.
    """
    for need in router.needs:
        try:
            need.check(library, names)
        except CompositionError as error:
            return need, error
    return None


def check_needs(router: Router, library: ExpertLibrary, names: Sequence[str]) -> None:
    """Raise :class:`CompositionError` unless a library meets all needs of a router; see :func:`first_lack`."""
    lack = first_lack(router, library, names)
    if lack is not None:
        raise lack[1]
