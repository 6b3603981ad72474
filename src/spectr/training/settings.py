"""What is adjustable about training an expert, or its gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spectr.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of one training run; the defaults are the paper's (SpectR, section 4.1).

    Attributes:
        rank: LoRA rank ``r``.
        alpha: LoRA alpha; the scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rslora``.
        dropout: LoRA dropout, from 0 to 1. On the tokens that all prompts share one mask serves the whole batch.
        rslora: Rank-stabilised scale.
        target_modules: PEFT's: ``"all-linear"``, or a regular expression, or names separated by commas.
        batch_size: Examples a step.
        learning_rate: AdamW's step size.
        schedule: Over the whole run, after the warm-up.
        warmup: Share of the steps that warm up linearly, from 0 to 1.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to this length.
        epochs: Passes over the examples.
        examples: Training examples used at most, the first of the file; ``None`` for all.
        max_length: Longer examples lose the middle of their prompt (counted and reported).
        seed: Of the initial matrix, the order and the dropout.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    rslora: bool = False
    target_modules: str = "all-linear"
    batch_size: int = 8
    learning_rate: float = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    examples: int | None = None
    max_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("rank", "alpha", "batch_size", "learning_rate", "epochs", "max_length", "max_grad_norm")
        wrong = _out_of_range(self, sizes, ("dropout", "warmup"))
        wrong += [f"examples={self.examples}"] if self.examples is not None and self.examples < 1 else []
        if wrong:
            raise DataError(
                f"training settings out of range: {', '.join(wrong)}",
                expected="positive sizes and rates; dropout and warmup from 0 to below 1; "
                "schedule constant, linear or cosine",
            )


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Settings of one training of gates; the defaults are the authors' but for the batch, which they do not fix.

    Attributes:
        steps: Optimiser steps.
        batch_size: Examples a step.
        learning_rate: AdamW's.
        schedule: After the warm-up.
        warmup: Share of the steps that warm up linearly, from 0 to below 1.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to this length.
        max_length: Longer examples lose the middle of their prompt.
        seed: Of the order.

    Source: PHATGOOSE (Muqeeth et al., 2024), section 4.
    """

    steps: int = 100
    batch_size: int = 8
    learning_rate: float = 5e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("steps", "batch_size", "learning_rate", "max_grad_norm", "max_length")
        wrong = _out_of_range(self, sizes, ("warmup",))
        if wrong:
            raise DataError(
                f"settings of the gates out of range: {', '.join(wrong)}",
                expected="positive sizes and rates; warmup from 0 to below 1; schedule constant, linear or cosine",
            )


def _out_of_range(
    settings: TrainingSettings | GateSettings, positive: Sequence[str], shares: Sequence[str]
) -> list[str]:
    wrong = [name for name in positive if not getattr(settings, name) > 0]
    wrong += [name for name in shares if not 0 <= getattr(settings, name) < 1]
    wrong += ["schedule"] if settings.schedule not in ("constant", "linear", "cosine") else []
    return [f"{name}={getattr(settings, name)!r}" for name in wrong]
