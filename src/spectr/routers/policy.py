"""A policy for whole prompts: evidence x use x token router."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from spectr.combine import Combination
from spectr.errors import CompositionError
from spectr.library.needs import CALIBRATED, Need, OneExpert
from spectr.routers.abstention import check_abstain, nulled
from spectr.routers.base import Router
from spectr.routers.evidence.base import Evidence, Found, ModuleEvidence
from spectr.routers.use import Use
from spectr.selection import Selection
from spectr.spectral import AlignedExpert, InputState, Share, SideData, Stack, State


class DelegatingRouter(Router):
    """A router that scores as another one does."""

    @property
    @abstractmethod
    def scorer(self) -> Router:
        """The other one."""

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`."""
        return self.scorer.init_expert(expert, side)

    def stack(self, shares: Mapping[str, Share]) -> Stack:
        """See :class:`Router`."""
        return self.scorer.stack(shares)

    def shares(self, stack: Stack) -> Mapping[str, Share]:
        """See :class:`Router`."""
        return self.scorer.shares(stack)

    def inputs(self, state: InputState, x_TI: Float[Tensor, "*T I"]) -> Float[Tensor, "*T P"]:
        """See :class:`Router`."""
        return self.scorer.inputs(state, x_TI)

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Float[Tensor, "*T P"], allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`."""
        return self.scorer.scores(state, x_TI, h_TP, allowed_TE)


class PromptRouter(DelegatingRouter):
    """Settings from which a policy for prompts is derived. As a router for each token it is the policy's router."""

    @property
    @abstractmethod
    def policy(self) -> PromptPolicy:
        """The parts that the settings stand for."""

    @property
    def scorer(self) -> Router:
        """See :class:`DelegatingRouter`: the policy's router."""
        return self.policy.router

    @property
    def reads(self) -> Literal["x", "h", "xh", ""]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See :class:`Router`."""
        return self.policy.router.reads

    @property
    def selection(self) -> Selection:
        """See :class:`Router`."""
        return self.policy.router.selection

    @property
    def combination(self) -> Combination:
        """See :class:`Router`."""
        return self.policy.router.combination

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`: what the token router and the evidence need."""
        policy = self.policy
        compared = nulled(self.abstain) if isinstance(policy.evidence, ModuleEvidence) else ()
        return tuple(dict.fromkeys((*policy.router.needs, *policy.evidence.needs, *compared)))


@dataclass(frozen=True, kw_only=True)
class PromptPolicy(PromptRouter):
    """Evidence of a whole prompt, what is done with it, and a router for each token: any combination of the three.

    Attributes:
        evidence: A number for each expert; see :mod:`spectr.routers.evidence`.
        use: Holds weights, keeps a shortlist, or informs each token's scores; see :mod:`spectr.routers.use`.
        router: Decides for each token, as far as the use leaves that to it.
        abstain: The base model alone answers a prompt unless its evidence is such as at most this share of ordinary
            prompts has, where the evidence knows that (:class:`spectr.routers.evidence.Found`). ``None``: an expert
            always answers, as one does that is the only one allowed.
    """

    evidence: Evidence
    use: Use
    router: Router
    abstain: float | None = None

    def __post_init__(self) -> None:
        check_abstain(self.abstain, auto=False)
        for name, kind in (("evidence", Evidence), ("use", Use), ("router", Router)):
            if not isinstance(getattr(self, name), kind):
                raise CompositionError(f"{name}={getattr(self, name)!r}", expected=f"a spectr.routers.{kind.__name__}")
        if (self.use.fixes or self.use.gathers) and self.use.excluded != 0:
            raise CompositionError(
                f"{self.use!r} has excluded={self.use.excluded}, and with it experts of number zero take no part",
                expected="excluded = 0.0 of a use that fixes or gathers",
            )
        if self.abstain is not None and not self.evidence.knows_p:
            raise CompositionError(
                f"abstain={self.abstain}, and {self.evidence!r} does not know what ordinary prompts have",
                do="leave abstain out, or take evidence from scores, such as score-means",
            )
        if self.evidence.calibrated_scores and CALIBRATED not in self.router.needs:
            raise CompositionError(
                f"{self.evidence!r} pools calibrated scores, and those of {self.router!r} have any size",
                expected="a token router with calibrated scores",
                do='take router=Calibrated(level="token")',
            )
        router, most = self.router, self.use.most
        if router.policy is not None or any(isinstance(need, OneExpert) for need in router.needs):
            raise CompositionError(
                f"{router!r} does not decide for each token among those it is given",
                expected="a router for each token, such as Spectr(top_k=4)",
                do="for one expert a prompt: a use that holds one, as Shortlist(size=1) does",
            )
        if self.pages and most is None:
            raise CompositionError(
                f"{self.use!r} has all experts take part, and with {self.evidence!r} they are on disk",
                expected="a use of a few experts: HoldWeights or KeepShortlist",
            )
        if self.pages and router.combination.depends_on_residents:
            raise CompositionError(
                f"{router!r} merges by all experts in memory, which change with the prompts of a batch",
                expected="another combination than 'knots'",
                do="leave combine out, or use a router that holds all experts",
            )
        if most is not None and not self.use.fixes and most < (router.selection.k or 1):
            raise CompositionError(
                f"a shortlist of {most}, of which {router!r} is to take {router.selection.k}",
                expected="a size of at least top_k",
            )

    @property
    def policy(self) -> PromptPolicy:
        """See :class:`PromptRouter`."""
        return self

    def verdict(self, found: Found) -> Float[Tensor, "B E"]:
        """The use's verdict; of prompts for which no expert stands out the base model's, which excludes all."""
        verdict_BE = self.use.verdict(found.evidence_BE)
        if self.abstain is None or found.p_B is None or verdict_BE.shape[-1] < 2:
            return verdict_BE
        alone_B = found.p_B.to(verdict_BE.device) > self.abstain
        return verdict_BE.masked_fill(alone_B[:, None], self.use.excluded)

    @property
    def pages(self) -> bool:
        """Whether experts stay on disk until a prompt calls for them."""
        return self.evidence.reads == "prototypes"


def token_router(router: Router) -> Router:
    """What decides for each token: a policy's router, or the router itself."""
    return router if router.policy is None else router.policy.router
