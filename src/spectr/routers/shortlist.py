"""Routing among very many experts: a shortlist for each prompt, and a router for each token among its experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spectr.errors import CompositionError
from spectr.library.needs import GATED, NORMED, Need, ProductsAlone
from spectr.renamed import options_renamed
from spectr.routers.abstention import check_abstain, nulled
from spectr.routers.calibrated import Calibrated
from spectr.routers.evidence.prototype_means import PrototypeMeans
from spectr.routers.policy import PromptPolicy, PromptRouter
from spectr.routers.router import Router
from spectr.routers.setting_checks import check_counts
from spectr.routers.use import HoldWeights, KeepShortlist, MultiplyScores
from spectr.selection import All


def _informed() -> Router:
    return Calibrated(level="prior")


@options_renamed(local="token_router", heard="modules", every="module_stride", pool_temperature=None)
@dataclass(frozen=True, kw_only=True)
class Shortlist(PromptRouter):
    """For each prompt, the ``size`` experts that fit it best; among these, ``token_router`` decides.

    The shortlist is the decision of :class:`Calibrated`, made with one direction of each expert instead of all
    (:class:`spectr.routers.evidence.PrototypeMeans`). Only these directions are in memory; experts on the shortlist are
    read from disk when a prompt needs them. After the prompt, an answer costs the same for any size of the library.

    Needs a calibrated and indexed library (:func:`spectr.build_index`).

    Attributes:
        size: Experts on a prompt's shortlist. With one, it is held for the whole answer, without ``token_router``.
        token_router: Decides for each token and layer among them. Any router that does so, and :class:`Calibrated`
            with the level ``"prior"``, which the prompt's evidence informs.
        probe_tokens: Maximum number of a prompt's tokens that are read for the decision.
        modules: Last parts of the names of the modules that are used for the decision, such as
            ``("q_proj", "k_proj")``. Empty for all.
        module_stride: Use every N-th of these modules; larger is faster and less accurate.
        bits: Bits per number of a prototype in memory: 8, 16 or 32. From 16 on the list is exact: it equals the list of
            full prototypes, in real numbers.
        abstain: The share of ordinary prompts that may get a list; if no expert stands out, the base model answers.
            ``"auto"`` is 0.05 if the calibration has enough ordinary prompts; ``None`` always lists experts.

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
                f"token_router={self.token_router!r} is not a router",
                expected="a router object, such as Spectr(top_k=4)",
            )
        if nulled(self.token_router.abstain):
            raise CompositionError(
                f"abstain={self.token_router.abstain} of the token router, which does not decide on prompts here",
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
        """See :class:`Router`: all experts on the list are held."""
        return All()

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`: an index, and the needs of the token router."""
        inner = (need for need in self.token_router.needs if need in (GATED, NORMED) or isinstance(need, ProductsAlone))
        return (*self.policy.evidence.needs, *nulled(self.abstain), *inner)
