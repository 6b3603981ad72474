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
from spectr.routers.base import LengthRouter, Lengths
from spectr.routers.evidence.score_means import ScoreMeans
from spectr.routers.policy import PromptPolicy
from spectr.routers.settings import check_settings
from spectr.routers.use import HoldWeights, MultiplyScores
from spectr.selection import TopK, Weighting
from spectr.spectral import AlignedExpert, InputState, Share, SideData, State, segment_norms

_LEVELS = "prompt", "token", "prior"


class Centers(NamedTuple):
    """``A*_t m / c_t`` of each expert, one after the other."""

    centers_P: Float[Tensor, " P"]


@options_renamed(pool_temperature=None, certainty_weight=None)
@dataclass(frozen=True, kw_only=True)
class Calibrated(LengthRouter):
    """``||A*_t (x - m)|| / c_t``: the spectral score minus what is the same for every input.

    ``m`` is a module's mean input and ``c_t`` the root mean square of ``||A*_t (x - m)||``, both over texts that the
    base model wrote itself (:func:`spectr.calibrate`), so that an expert's size buys it nothing. For a prompt the
    power means of its tokens' scores are compared with those that each expert has for ordinary prompts
    (:class:`spectr.routers.evidence.ScoreMeans`).

    Attributes:
        level: ``"prompt"`` decides once for each prompt and holds the decision while the answer is written;
            ``"token"`` decides for each token and module, as the paper does; ``"prior"`` does that too, with each
            score multiplied by ``exp(prior_strength * evidence)``.
        top_k: Experts for each prompt, or for each token and module.
        weights: ``"uniform"`` (``1 / k``) or ``"softmax"`` of the chosen evidence (prompt) or scores (token).
        temperature: Of that softmax.
        prior_strength: 0 is ``level="token"``; the larger, the more the prompt decides.
        probe_tokens: Tokens of a prompt that are read for the decision at most.
        abstain: The share of ordinary prompts that goes to an expert nonetheless; the base model alone answers where
            no expert stands out. ``"auto"`` is 0.05 where the calibration has the ordinary prompts for that; ``None``
            always chooses an expert.
        combine: ``"outputs"``, or another of :data:`spectr.combine.COMBINATIONS`.

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
                f"abstain={self.abstain} with level='token', where nothing decides on the prompt",
                do="leave abstain out, or use level='prompt' or 'prior'",
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
        """See :class:`Router`: as the level says."""
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
        """See :class:`Router`: ``A* / c``, ``B* c`` and ``A* m / c``, so that the scores have the root mean square 1.

        An expert that does nothing here (``c`` 0) stays as it is, and so does one at a module that no text of the
        calibration reaches.
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
