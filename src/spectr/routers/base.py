"""What a router is: three small axes (score, select, combine), prepared once."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectr.spectral import Aligned, Prepared


@runtime_checkable
class Router(Protocol):
    """The interface that composing, tracing and serving know; anything that has it is a router.

    How its scores become an update follows from its fields (:mod:`spectr.routers.settings`): ``top_k``, ``weights`` and
    ``temperature`` (without ``top_k`` all experts are taken), and ``combine``. A method ``resident(experts)`` says
    which of a library's experts the model has to hold, where that is not all of them.

    ``prepare`` runs once for each expert and module, alone, so that an expert more or less changes nothing for the
    others. ``scores`` runs for each token and is pure.

    A router with an attribute ``calibrated`` that is true is given calibrated shares, for which the library has to be
    calibrated (:func:`spectr.calibrate`): ``norms_TE`` are then ``||A_t (x - m)||_2`` over their root mean square.
    One with an attribute ``gated`` that is true is given each expert's trained gate as its prototype
    (:meth:`spectr.spectral.Prepared.gated`). One with an attribute ``shares_A`` that is true has the input factor that
    all experts of a module share computed once (:meth:`spectr.spectral.Prepared.rooted`). One with an attribute
    ``by_norms`` that is true has ``norms_TE`` as its scores, times a prompt's prior where there is one; few tokens
    are routed by a compiled function (:mod:`spectr.layers.kernels`).
    """

    def prepare(self, aligned: Aligned) -> Prepared:
        """One expert's share of a module's stack, float32."""
        ...

    def scores(
        self,
        x_TI: Float[Tensor, "*T I"],
        norms_TE: Float[Tensor, "*T E"],
        prototypes_EI: Float[Tensor, "E I"] | None,
    ) -> Float[Tensor, "*T E"]:
        """Scores of all experts for each token, float32.

        Args:
            x_TI: The module's input.
            norms_TE: ``||A_t x||_2`` of the prepared factors, float32.
            prototypes_EI: The stack's prototypes, where ``prepare`` made some.
        """
        ...


@runtime_checkable
class ShortlistRouter(Router, Protocol):
    """A router that scores only some experts for each token; the rest are not computed for it."""

    def candidates(
        self,
        x_TI: Float[Tensor, "*T I"],
        prototypes_EI: Float[Tensor, "E I"],
        among_B1E: Bool[Tensor, "B _ E"] | None = None,
    ) -> Bool[Tensor, "*T E"]:
        """Which experts are scored for each token.

        Args:
            x_TI: The module's input.
            prototypes_EI: The stack's prototypes, which ``prepare`` made.
            among_B1E: Those that may be, for a row of tokens or for each token, as if there were no others.
        """
        ...


@runtime_checkable
class PromptRouter(Router, Protocol):
    """A router for which a whole prompt is read before it is answered; the verdict is held."""

    @property
    def level(self) -> str:
        """``"prompt"``: the verdict is the experts' weights, for all tokens. ``"prior"``: it informs each token's
        scores. ``"token"``: no prompt is read, the router is used like any other."""
        ...

    def verdict(self, evidence_BE: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """From what speaks for each expert to its weight, or to the prior."""
        ...

    def informed(self, scores_TE: Float[Tensor, "*T E"], prior_B1E: Float[Tensor, "B _ E"]) -> Float[Tensor, "*T E"]:
        """A token's scores with the prompt's prior, one for a row of tokens, or each token's own."""
        ...


@runtime_checkable
class ProbingRouter(PromptRouter, Protocol):
    """A router whose evidence comes from its own scores, pooled over the prompt.

    Before a prompt is read, the base model reads it once alone (the probe). Every module's scores become evidence,
    whose mean over tokens and modules decides, less what the same experts have on the calibration's texts.
    """

    @property
    def probe_tokens(self) -> int:
        """Tokens of a prompt that the probe reads at most."""
        ...

    def evidence(self, scores_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T E"]:
        """What one module's scores of one token say for each of its experts, float32; 1 says nothing."""
        ...

    def certainty(self, evidence_TE: Float[Tensor, "*T E"]) -> Float[Tensor, "*T"]:
        """How much each token's evidence counts in its module's mean, above zero."""
        ...


@runtime_checkable
class GuidedRouter(PromptRouter, Protocol):
    """A router whose evidence comes from a guide: how like the prompt each expert's description is."""

    @property
    def guided(self) -> bool:
        """True."""
        ...


def segment_norms(
    h_TP: Float[Tensor, "*T P"], common_rank: int | None, member_EP: Float[Tensor, "E P"]
) -> Float[Tensor, "*T E"]:
    """``||h_t||_2`` of each expert's own part of ``h``, in float32 whatever the dtype of ``h`` (float64 stays so).

    Args:
        h_TP: The experts' parts, one after the other.
        common_rank: Their length; ``None`` where it differs.
        member_EP: One where row ``p`` belongs to expert ``e``, else zero; used where the lengths differ.
    """
    wide = torch.promote_types(h_TP.dtype, torch.float32)
    if common_rank is None:
        return (h_TP.to(wide).square() @ member_EP.mT.to(wide)).sqrt()
    parts_TER = h_TP.unflatten(-1, (len(member_EP), common_rank))
    return torch.linalg.vector_norm(parts_TER, dim=-1, dtype=wide)
