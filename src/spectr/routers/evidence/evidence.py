"""How well each expert fits a whole prompt; computed before the first token of the answer.

Legend: B rows of the batch, N tokens of all rows, T tokens, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectr.errors import CompositionError
from spectr.library.library import ExpertLibrary
from spectr.library.needs import Need

_SEPARATE = "q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin", "q_attn"
_JOINED = "qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "kv_proj", "query_key"
_LATENT = "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"  # DeepSeek's attention
BEFORE_ATTENTION = frozenset((*_SEPARATE, *_JOINED, *_LATENT))  # last parts of names of modules that attention reads
Similarity = Callable[..., Float[Tensor, "B E"]]


class Found(NamedTuple):
    """The evidence for prompts.

    Attributes:
        evidence_BE: How well each expert fits, float32 or float64. Larger is better.
        p_B: The share of ordinary prompts whose best expert has as much evidence; ``None`` if unknown.
        threshold: The evidence above which some expert knows a prompt's task; ``None`` if unknown.
    """

    evidence_BE: Float[Tensor, "B E"]
    p_B: Float[Tensor, " B"] | None = None
    threshold: float | None = None


Reader = Callable[..., Found]


@runtime_checkable
class Guide(Protocol):
    """Compares prompts with descriptions; :class:`spectr.guidance.QueryGuide` is one."""

    def reader(self, descriptions: Mapping[str, str], experts: Sequence[str]) -> Similarity:
        """A function with the model's arguments that returns ``cos(e_t, q)``, (batch, experts)."""
        ...


@runtime_checkable
class ComparingGuide(Guide, Protocol):
    """A guide that compares descriptions with each other, too."""

    def between(self, descriptions: Mapping[str, str]) -> Float[Tensor, "E E"]:
        """``cos(e_t, e_u)``."""
        ...


@runtime_checkable
class Source(Protocol):
    """What a composed model provides to evidence."""

    @property
    def library(self) -> ExpertLibrary:
        """The experts and all data about them."""
        ...

    @property
    def guide(self) -> Guide | None:
        """Compares descriptions, if the model was composed with a guide."""
        ...

    def module_reader(self, evidence: ModuleEvidence, experts: tuple[str, ...]) -> Reader:
        """Makes a reader that runs the base model on a prompt and pools the evidence of the scores at each module."""
        ...


class Evidence(ABC):
    """How well each expert fits a prompt. A frozen dataclass, which is its own configuration.

    Attributes:
        reads: ``"scores"`` of the token router at each module; ``"prototypes"`` of the library's index, so that experts
            can stay on disk; or the ``"words"`` of the prompt.
        knows_p: Whether it may know the share of ordinary prompts with as much evidence (:attr:`Found.p_B`), which a
            policy needs to abstain.
        knows_threshold: Whether it may know the evidence above which some expert knows a prompt's task
            (:attr:`Found.threshold`).
        calibrated_scores: Whether the token router's scores must be calibrated.
    """

    reads: ClassVar[Literal["scores", "prototypes", "words"]] = "words"
    knows_p: ClassVar[bool] = True
    knows_threshold: ClassVar[bool] = False
    calibrated_scores: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the library must provide."""
        return ()

    @abstractmethod
    def reader(self, source: Source, experts: tuple[str, ...]) -> Reader:
        """Make a reader of prompts for a set of experts, as if no others existed.

        Args:
            source: The composed model's library and its means of reading prompts.
            experts: The allowed experts, in alphabetical order.

        Returns:
            A function with the arguments of the model (or its encoder). It returns a number for each prompt and expert
            (:class:`Found`).
        """


class ModuleScores(NamedTuple):
    """Scores of one module's experts for the counted tokens of a batch.

    Attributes:
        scores_NE: Float32.
        row_N: Each token's row of the batch.
        rows: Rows of the batch.
    """

    scores_NE: Float[Tensor, "N E"]
    row_N: Int[Tensor, " N"]
    rows: int

    def mean(self, values_NE: Float[Tensor, "N E"], weight_N: Float[Tensor, " N"]) -> Float[Tensor, "B E"]:
        """Each row's weighted mean over its tokens."""
        total_BE = values_NE.new_zeros(self.rows, values_NE.shape[-1])
        total_BE.index_add_(0, self.row_N, values_NE * weight_N[:, None])
        weight_B = weight_N.new_zeros(self.rows).index_add_(0, self.row_N, weight_N)
        return total_BE / weight_B[:, None].clamp(min=1e-30)


class ModuleEvidence(Evidence):
    """Evidence from scores at the modules: computed at each, pooled over all, compared with the calibration's texts.

    The base model reads the prompt once for it, without experts.

    Attributes:
        probe_tokens: Maximum number of a prompt's tokens that are read.
        modules: Last parts of the names of the modules to use; empty for all.
        module_stride: Use every N-th of these modules.
        attention_weight: Weight of the modules whose outputs attention reads (queries, keys and values) in the mean
            over modules. All other modules have the weight 1.
    """

    probe_tokens: int = 256
    modules: tuple[str, ...] = ()
    module_stride: int = 1
    attention_weight: float = 1.0

    def reader(self, source: Source, experts: tuple[str, ...]) -> Reader:
        """See :class:`Evidence`."""
        return source.module_reader(self, experts)

    @abstractmethod
    def of_module(self, scores: ModuleScores) -> Float[Tensor, "Q B E"]:
        """One module's numbers (Q of them) for its own experts, pooled over each row's tokens.

        NaN means that an expert has no score at this module.
        """

    def of_prompt(
        self,
        found: Mapping[str, Float[Tensor, "Q B M"]],
        holders: Mapping[str, Sequence[str]],
        experts: Sequence[str],
    ) -> Float[Tensor, "Q B E"]:
        """Each expert's weighted means over the modules where it has a score; NaN if there are none.

        Args:
            found: By module, the result of :meth:`of_module`.
            holders: By module, the names of its experts.
            experts: All experts.

        Raises:
            CompositionError: No module has scores.
        """
        if not found:
            raise CompositionError(
                "no layer could score this prompt", do="use level='token', or choose the experts yourself"
            )
        first = next(iter(found.values()))
        total_QBE = first.new_zeros(*first.shape[:2], len(experts))
        weight_QBE = torch.zeros_like(total_QBE)
        places = {expert: place for place, expert in enumerate(experts)}
        for module, numbers_QBM in found.items():
            columns = [places[expert] for expert in holders[module]]
            weight = self.attention_weight if module.rpartition(".")[2] in BEFORE_ATTENTION else 1.0
            total_QBE[..., columns] += weight * numbers_QBM.nan_to_num()
            weight_QBE[..., columns] += weight * ~numbers_QBM.isnan()
        return total_QBE / weight_QBE

    @abstractmethod
    def compare(self, found_QBE: Float[Tensor, "Q B E"], null_QKE: Float[Tensor, "Q K E"], *, ordinary: bool) -> Found:
        """The evidence: the prompts' numbers compared with those of the calibration's texts.

        Args:
            found_QBE: Numbers of the prompts.
            null_QKE: Numbers of the K texts, for the same experts.
            ordinary: Whether the texts are ordinary prompts of all lengths
                (:attr:`spectr.library.Calibration.null`), so that ``p_B`` has a meaning; otherwise it is omitted.
        """
