"""Routing among very many experts: a prompt's shortlist, and a router for each token among those on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spectr.errors import CompositionError
from spectr.library.needs import GATED, Need, ProductsAlone
from spectr.renamed import options_renamed
from spectr.routers.abstention import check_abstain, nulled
from spectr.routers.base import Router
from spectr.routers.calibrated import Calibrated
from spectr.routers.evidence.prototype_means import PrototypeMeans
from spectr.routers.policy import PromptPolicy, PromptRouter
from spectr.routers.settings import check_counts
from spectr.routers.use import HoldWeights, KeepShortlist, MultiplyScores
from spectr.selection import All


def _informed() -> Router:
    return Calibrated(level="prior")


@options_renamed(local="token_router", heard="modules", every="module_stride", pool_temperature=None)
@dataclass(frozen=True, kw_only=True)
class Shortlist(PromptRouter):
    """For each prompt the ``size`` experts that its words call for; among these ``token_router`` decides.

    The shortlist is the decision of :class:`Calibrated`, made with one direction of each expert in place of all
    (:class:`spectr.routers.evidence.PrototypeMeans`). Only these are in memory; the experts on the shortlist are read
    from disk when a prompt calls for them. After the prompt an answer costs the same whatever the size of the library.

    Needs a calibrated and indexed library (:func:`spectr.build_index`).

    Attributes:
        size: Experts on a prompt's shortlist. One is held for the whole answer, and ``token_router`` is not used.
        token_router: Decides for each token and module among them; any router that does so, and :class:`Calibrated`
            with the level ``"prior"``, which the prompt's evidence informs.
        probe_tokens: See :class:`PrototypeMeans`, as for the following.
        modules: Last parts of the names of the modules that take part in the decision, such as
            ``("q_proj", "k_proj")``. Empty for all.
        module_stride: Every how many-th of these takes part; more costs less and finds less.
        bits: Of each number of a prototype in memory: 8, 16 or 32. From 16 on the list is certain: it is the one that
            prototypes in full give, in real numbers.
        abstain: The share of ordinary prompts that gets a list nonetheless; the base model alone answers where no
            expert stands out. ``"auto"`` is 0.05 where the calibration has the ordinary prompts for that; ``None``
            always lists experts.

    Source: ours, with the prototypes of Arrow (Ostapenko et al., 2024) and the two steps of LAG (Fleshman and Van
    Durme, 2025); see docs/howto/scale.md.
    """

    size: int = 16
    token_router: Router = field(default_factory=_informed)
    probe_tokens: int = 256
    modules: tuple[str, ...] = ()
    module_stride: int = 1
    bits: int = 8
    abstain: float | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        check_counts(size=self.size)
        check_abstain(self.abstain)
        if isinstance(self.token_router, type) or not isinstance(self.token_router, Router):
            raise CompositionError(
                f"token_router={self.token_router!r} is no router", expected="a router object, as in Spectr(top_k=4)"
            )
        if nulled(self.token_router.abstain):
            raise CompositionError(
                f"abstain={self.token_router.abstain} of the token router, which decides on no prompt here",
                do="set it for the shortlist: Shortlist(abstain=...)",
            )
        _ = self.policy

    @property
    def policy(self) -> PromptPolicy:
        """See :class:`PromptRouter`."""
        evidence = PrototypeMeans(
            probe_tokens=self.probe_tokens,
            modules=self.modules,
            module_stride=self.module_stride,
            bits=self.bits,
        )
        router, prior, inner = self.token_router, None, self.token_router.policy
        if inner is not None and isinstance(inner.use, MultiplyScores):
            router, prior = inner.router, inner.use
        use = HoldWeights() if self.size == 1 else KeepShortlist(size=self.size, prior=prior)
        abstain = None if isinstance(self.abstain, str) else self.abstain
        return PromptPolicy(evidence=evidence, use=use, router=router, abstain=abstain)

    @property
    def selection(self) -> All:
        """See :class:`Router`: all on the list are held."""
        return All()

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`: an index, and what the token router reads and combines of experts."""
        inner = (need for need in self.token_router.needs if need == GATED or isinstance(need, ProductsAlone))
        return (*self.policy.evidence.needs, *nulled(self.abstain), *inner)
