"""Self-calibrated routing: how much larger an expert's update is than on average inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.library.needs import CALIBRATED, Need
from spectr.renamed import options_renamed
from spectr.routers.abstention import check_abstain, nulled
from spectr.routers.evidence.score_means import ScoreMeans
from spectr.routers.policy import PromptPolicy
from spectr.routers.router import LengthRouter, Lengths
from spectr.routers.setting_checks import check_settings
from spectr.routers.use import HoldWeights, MultiplyScores
from spectr.selection import TopK, Weighting
from spectr.spectral import AlignedExpert, InputState, Share, SideData, State, segment_norms

_LEVELS = "prompt", "token", "prior"


class Centers(NamedTuple):
    """``A*_t m / c_t`` of each expert, in order."""

    centers_P: Float[Tensor, " P"]


@options_renamed(pool_temperature=None, certainty_weight=None)
@dataclass(frozen=True, kw_only=True)
class Calibrated(LengthRouter):
    """``||A*_t (x - m)|| / c_t``: the spectral score minus the part that is the same for every input.

    ``m`` is a module's mean input and ``c_t`` the root mean square of ``||A*_t (x - m)||``, over texts that the base
    model wrote (:func:`spectr.calibrate`), so that an expert's size does not raise its score. For a prompt, the power
    means of its tokens' scores are compared with each expert's values for ordinary prompts
    (:class:`spectr.routers.evidence.ScoreMeans`).

    Attributes:
        level: ``"prompt"`` decides once for each prompt and keeps the decision for the answer. ``"token"`` decides for
            each token and layer, as in the paper. ``"prior"`` also decides for each token, with scores multiplied by
            ``exp(prior_strength * evidence)``.
        top_k: Experts per prompt, or per token and layer.
        weights: ``"uniform"`` (``1 / k``) or ``"softmax"`` of the chosen evidence (prompt) or scores (token).
        temperature: Temperature of the softmax.
        prior_strength: 0 equals ``level="token"``; with larger values the prompt has more influence.
        probe_tokens: Maximum number of a prompt's tokens that are read for the decision.
        abstain: The share of ordinary prompts that an expert may answer; if no expert stands out, the base model
            answers. ``"auto"`` is 0.05 if the calibration has enough ordinary prompts; ``None`` always chooses an
            expert.
        combine: ``"outputs"``, or another name in :data:`spectr.combine.COMBINATIONS`.

    Source: ours; see docs/reference/routers.md.
    """

    level: Literal["prompt", "token", "prior"] = "prompt"
    top_k: int = 1
    weights: Weighting = "uniform"
    temperature: float = 1.0
    prior_strength: float = 2.0
    probe_tokens: int = 256
    abstain: float | Literal["auto"] | None = "auto"
    combine: str = "outputs"

    def __post_init__(self) -> None:
        check_settings(self, level=(self.level, _LEVELS))
        check_abstain(self.abstain)
        if self.policy is None and nulled(self.abstain):
            raise CompositionError(
                f"abstain={self.abstain} with level='token', which does not decide on prompts",
                do="omit abstain, or use level='prompt' or 'prior'",
            )
        _ = self._evidence, self._prior

    @property
    def selection(self) -> TopK:
        """See :class:`Router`."""
        return TopK(k=self.top_k, weighting=self.weights, temperature=self.temperature)

    @property
    def needs(self) -> tuple[Need, ...]:
        """See :class:`Router`."""
        return (*super().needs, CALIBRATED, *nulled(self.abstain))

    @property
    def policy(self) -> PromptPolicy | None:
        """See :class:`Router`; depends on the level."""
        hold = HoldWeights(top_k=self.top_k, weights=self.weights, temperature=self.temperature)
        use = {"prompt": hold, "token": None, "prior": self._prior}[self.level]
        if use is None:
            return None
        abstain = None if isinstance(self.abstain, str) else self.abstain
        router = replace(self, level="token", abstain="auto")
        return PromptPolicy(evidence=self._evidence, use=use, router=router, abstain=abstain)

    @property
    def _evidence(self) -> ScoreMeans:
        return ScoreMeans(probe_tokens=self.probe_tokens)

    @property
    def _prior(self) -> MultiplyScores:
        return MultiplyScores(strength=self.prior_strength)

    def init_expert(self, expert: AlignedExpert, side: SideData) -> Share:
        """See :class:`Router`: ``A* / c``, ``B* c`` and ``A* m / c``, so that scores have the root mean square 1.

        An expert without effect here (``c`` is 0) is unchanged, and so is one at a module that no calibration text
        reaches.
        """
        share, rms = Share.spectral(expert.aligned), side.rms or 1.0
        A = share.A / rms
        mean_I = A.new_zeros(A.shape[-1]) if side.mean_I is None else side.mean_I
        return Share(A, share.B * rms, own=Centers(A @ mean_I))

    def scores(
        self, state: State, x_TI: Float[Tensor, "*T I"], h_TP: Float[Tensor, "*T P"], allowed_TE: Tensor | None
    ) -> Float[Tensor, "*T E"]:
        """See :class:`Router`: ``||A*_t (x - m)|| / c_t``."""
        return segment_norms(h_TP - state.own.centers_P, state)

    def lengths(self, state: InputState) -> Lengths:
        """See :class:`LengthRouter`."""
        return Lengths(state.A_PI, state.own.centers_P)
