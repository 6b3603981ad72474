"""How well each expert fits a whole prompt, found before the prompt's first token is answered.

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

Similarity = Callable[..., Float[Tensor, "B E"]]


class Found(NamedTuple):
    """What was found of prompts.

    Attributes:
        evidence_BE: How well each expert fits, float32 or float64. The larger, the better.
        p_B: The share of ordinary prompts whose best expert has as much evidence; ``None`` where that is not known.
    """

    evidence_BE: Float[Tensor, "B E"]
    p_B: Float[Tensor, " B"] | None = None


Reader = Callable[..., Found]


@runtime_checkable
class Guide(Protocol):
    """Compares prompts with descriptions; :class:`spectr.guidance.QueryGuide` is one."""

    def reader(self, descriptions: Mapping[str, str], experts: Sequence[str]) -> Similarity:
        """A function that is called as the model is and returns ``cos(e_t, q)``, (batch, experts)."""
        ...


@runtime_checkable
class Source(Protocol):
    """What a composed model offers to evidence."""

    @property
    def library(self) -> ExpertLibrary:
        """The experts, with all that is known of them."""
        ...

    @property
    def guide(self) -> Guide | None:
        """What compares words, where the model was composed with it."""
        ...

    def module_reader(self, evidence: ModuleEvidence, experts: tuple[str, ...]) -> Reader:
        """What has the base model read a prompt and pools what the evidence makes of the scores at each module."""
        ...


class Evidence(ABC):
    """How well each expert fits a prompt. A frozen dataclass, which is its own configuration.

    Attributes:
        reads: What it reads: ``"scores"`` of the token router at each module, ``"prototypes"`` of the library's index
            in the place of the experts, which may then stay on disk, or the ``"words"`` of the prompt.
        knows_p: Whether it may tell how many ordinary prompts have as much (:attr:`Found.p_B`), so that a policy can
            abstain.
        calibrated_scores: Whether the token router's scores have to be calibrated.
    """

    reads: ClassVar[Literal["scores", "prototypes", "words"]] = "words"
    knows_p: ClassVar[bool] = True
    calibrated_scores: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the library has to bring."""
        return ()

    @abstractmethod
    def reader(self, source: Source, experts: tuple[str, ...]) -> Reader:
        """What reads prompts for a set of experts, as if there were no others.

        Args:
            source: The composed model's library and its means to read prompts.
            experts: The allowed experts, in alphabetical order.

        Returns:
            A function that is called as the model (or its encoder) is called, and gives for each prompt and expert a
            number (:class:`Found`).
        """


class ModuleScores(NamedTuple):
    """Scores of one module's experts for the tokens of a batch that count.

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
    """Evidence from scores at the modules: made at each, pooled over all, compared with the calibration's texts.

    The base model reads the prompt once for it, without experts.

    Attributes:
        probe_tokens: Tokens of a prompt that are read at most.
        modules: Last parts of the names of the modules that take part; empty for all.
        module_stride: Every how many-th of these takes part.
    """

    probe_tokens: int = 256
    modules: tuple[str, ...] = ()
    module_stride: int = 1

    def reader(self, source: Source, experts: tuple[str, ...]) -> Reader:
        """See :class:`Evidence`."""
        return source.module_reader(self, experts)

    @abstractmethod
    def of_module(self, scores: ModuleScores) -> Float[Tensor, "Q B E"]:
        """One module's numbers (Q of them) for its own experts, pooled over each row's tokens.

        NaN is the number of an expert that takes no part at this module.
        """

    def of_prompt(
        self,
        found: Mapping[str, Float[Tensor, "Q B M"]],
        holders: Mapping[str, Sequence[str]],
        experts: Sequence[str],
    ) -> Float[Tensor, "Q B E"]:
        """Each expert's means over the modules where it takes part; NaN where there is none.

        Args:
            found: By module what :meth:`of_module` gives.
            holders: By module the names of its experts.
            experts: All of them.

        Raises:
            CompositionError: No module takes part.
        """
        if not found:
            raise CompositionError(
                "no layer could score this prompt", do="use level='token', or name the experts yourself"
            )
        first = next(iter(found.values()))
        total_QBE = first.new_zeros(*first.shape[:2], len(experts))
        count_QBE = torch.zeros_like(total_QBE)
        places = {expert: place for place, expert in enumerate(experts)}
        for module, numbers_QBM in found.items():
            columns = [places[expert] for expert in holders[module]]
            total_QBE[..., columns] += numbers_QBM.nan_to_num()
            count_QBE[..., columns] += ~numbers_QBM.isnan()
        return total_QBE / count_QBE

    @abstractmethod
    def compare(self, found_QBE: Float[Tensor, "Q B E"], null_QKE: Float[Tensor, "Q K E"], *, ordinary: bool) -> Found:
        """The evidence: prompts' numbers compared with those of the calibration's texts.

        Args:
            found_QBE: Of prompts.
            null_QKE: Of the K texts, for the same experts.
            ordinary: Whether these are ordinary prompts of all lengths (:attr:`spectr.library.Calibration.null`), so
                that the share of them that has as much evidence says something; otherwise ``p_B`` is left out.
        """
