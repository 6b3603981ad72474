"""SEQR: the spectral score at the cost of small matrices, for experts that share their input factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from spectr.routers.router import LengthRouter, Lengths
from spectr.routers.spectr import Spectr
from spectr.selection import TopK, Weighting
from spectr.spectral import AlignedExpert, InputState, Share, SideData, Stack, State

_SPECTR = Spectr()


@dataclass(frozen=True, kw_only=True)
class Seqr(LengthRouter):
    """The spectral score ``||delta_t x||``, exactly, by ``||M_t A x||`` where experts share ``A``.

    With ``U_t`` of the SVD of ``delta_t = c B_t A``, ``M_t = U_t^T c B_t`` is (R, R) and ``A*_t = M_t A``. ``A x`` is
    computed once, then ``R^2`` multiply-adds per expert. ``||M_t A x|| = ||R_t A x||`` with the ``R_t`` of a QR
    decomposition of ``c B_t``, as the authors write it: both are ``c B_t A x`` in an orthonormal basis. Layers whose
    experts do not all share ``A`` are scored as by :class:`Spectr`.

    Attributes:
        top_k: Experts per token and layer.
        weights: ``"uniform"`` (``1 / k``) or ``"softmax"`` of the chosen scores.
        temperature: Temperature of the softmax.
        combine: ``"outputs"``, or another name in :data:`spectr.combine.COMBINATIONS`.

    Source: SEQR (Fleshman and Van Durme, 2025), without its normalisation, which :class:`SeqrNormalised` has.
    """

    top_k: int = 1
    weights: Weighting = "uniform"
    temperature: float = 1.0
    combine: str = "outputs"

    @property
    def selection(self) -> TopK:
        """See :class:`Router`."""
        return TopK(k=self.top_k, weighting=self.weights, temperature=self.temperature)

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`: with ``A_t``, which may be shared, and ``M_t``."""
        return Share.spectral(expert.aligned)._replace(root=expert.A_RI, mix=expert.aligned.U.mT @ expert.B_OR)

    def stack(self, shares: Mapping[str, Share]) -> Stack:
        """See :class:`Router`: if all experts have the same ``A``, bit for bit, that one and each ``M_t``."""
        stack = Stack.of(shares)
        roots = [root for name in stack.experts if (root := shares[name].root) is not None]
        mixes = [mix for name in stack.experts if (mix := shares[name].mix) is not None]
        if len(roots) < 2 or len(roots) < len(shares) or not all(torch.equal(root, roots[0]) for root in roots):
            return stack
        return replace(stack, A_PI=roots[0], mix_PR=torch.cat(mixes))

    def shares(self, stack: Stack) -> Mapping[str, Share]:
        """See :class:`Router`: none, since a stack does not keep each expert's ``A_t``."""
        return {}

    def inputs(self, state: InputState, x_TI: Float[Tensor, "*T I"]) -> Float[Tensor, "*T P"]:
        """See :class:`Router`: ``A x`` once, then ``M_t A x``."""
        h_TQ = linear(x_TI, state.A_PI)
        return h_TQ if state.mix_PR is None else linear(h_TQ, state.mix_PR)

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Float[Tensor, "*T P"], allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: ``||M_t A x||``, SpectR's score from other products."""
        return _SPECTR.scores(state, x_TI, h_TP, allowed_TE)

    def lengths(self, state: InputState) -> Lengths:
        """See :class:`LengthRouter`: as :class:`Spectr`, with one input factor per expert."""
        return Lengths(state.A_PI)
