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
from spectr.routers.evidence.evidence import Evidence, Found, ModuleEvidence
from spectr.routers.router import Router
from spectr.routers.use import Use
from spectr.selection import Selection
from spectr.spectral import AlignedExpert, InputState, Share, SideData, Stack, State


class DelegatingRouter(Router):
    """A router that uses another router's scores."""

    @property
    @abstractmethod
    def scorer(self) -> Router:
        """The other router."""

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
    """Settings that define a policy for prompts. As a router for each token it is the policy's router."""

    @property
    @abstractmethod
    def policy(self) -> PromptPolicy:
        """The policy that the settings define."""

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
        """See :class:`Router`: the needs of the token router and the evidence."""
        policy = self.policy
        compared = nulled(self.abstain) if isinstance(policy.evidence, ModuleEvidence) else ()
        return tuple(dict.fromkeys((*policy.router.needs, *policy.evidence.needs, *compared)))


@dataclass(frozen=True, kw_only=True)
class PromptPolicy(PromptRouter):
    """Evidence for a whole prompt, its use, and a router for each token, in any combination.

    Attributes:
        evidence: Computes a number for each expert; see :mod:`spectr.routers.evidence`.
        use: Holds weights, keeps a shortlist, or informs each token's scores; see :mod:`spectr.routers.use`.
        router: Decides for each token, as far as the use allows.
        abstain: The false-alarm rate, above 0 and below 1. If a larger share of ordinary prompts has as much evidence
            as the prompt, the base model answers. The evidence must know that share
            (:class:`spectr.routers.evidence.Found`). ``None``: an expert always answers. A single allowed expert
            always answers.
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
                f"{self.use!r} has excluded={self.use.excluded}, but it leaves out experts whose number is zero",
                expected="excluded = 0.0 for a use that fixes or gathers",
            )
        if self.abstain is not None and not self.evidence.knows_p:
            raise CompositionError(
                f"abstain={self.abstain}, but {self.evidence!r} does not compare with ordinary prompts",
                do="omit abstain, or use evidence from scores, such as score-means",
            )
        if self.use.wants_threshold and not self.evidence.knows_threshold:
            raise CompositionError(
                f"threshold='descriptions', and {self.evidence!r} compares no descriptions",
                expected="evidence from descriptions",
                do="give a number as the threshold, or as alpha",
            )
        if self.evidence.calibrated_scores and CALIBRATED not in self.router.needs:
            raise CompositionError(
                f"{self.evidence!r} needs calibrated scores, but {self.router!r} has none",
                expected="a token router with calibrated scores",
                do='use router=Calibrated(level="token")',
            )
        if self.use.multiplies and self.router.signed:
            raise CompositionError(
                f"{self.use!r} multiplies scores, but those of {self.router!r} may be below zero",
                expected="a token router with scores of at least zero, such as Spectr",
                do="for this router, use AddToScores",
            )
        router, most = self.router, self.use.most
        if router.policy is not None or any(isinstance(need, OneExpert) for need in router.needs):
            raise CompositionError(
                f"{router!r} does not decide for each token",
                expected="a router for each token, such as Spectr(top_k=4)",
                do="for one expert per prompt, use one that holds it, such as Shortlist(size=1)",
            )
        if self.pages and most is None:
            raise CompositionError(
                f"{self.use!r} uses all experts, but with {self.evidence!r} they stay on disk",
                expected="a use of a few experts: HoldWeights or KeepShortlist",
            )
        if self.pages and router.combination.depends_on_residents:
            raise CompositionError(
                f"{router!r} merges with all experts in memory, which depend on the prompts of a batch",
                expected="a combination other than 'knots'",
                do="omit combine, or use a router that holds all experts",
            )
        if most is not None and not self.use.fixes and most < (router.selection.k or 1):
            raise CompositionError(
                f"a shortlist of {most}, but {router!r} chooses {router.selection.k}",
                expected="a size of at least top_k",
            )

    @property
    def policy(self) -> PromptPolicy:
        """See :class:`PromptRouter`."""
        return self

    def verdict(self, found: Found) -> Float[Tensor, "B E"]:
        """The use's verdict. For prompts where no expert stands out it excludes all, so that the base model answers."""
        verdict_BE = self.use.verdict_above(found.evidence_BE, found.threshold)
        if self.abstain is None or found.p_B is None or verdict_BE.shape[-1] < 2:
            return verdict_BE
        alone_B = found.p_B.to(verdict_BE.device) > self.abstain
        return verdict_BE.masked_fill(alone_B[:, None], self.use.excluded)

    @property
    def pages(self) -> bool:
        """Whether experts stay on disk until a prompt needs them."""
        return self.evidence.reads == "prototypes"


def token_router(router: Router) -> Router:
    """The router for each token: a policy's router, or the router itself."""
    return router if router.policy is None else router.policy.router
