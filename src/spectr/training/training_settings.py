"""Settings of training an expert or its gates."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from spectr.errors import DataError


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Settings of both trainings.

    Attributes:
        batch_size: Examples per step.
        learning_rate: AdamW's learning rate.
        schedule: Schedule after the warm-up, over the whole run.
        warmup: Share of steps with linear warm-up, from 0 to below 1.
        weight_decay: AdamW's weight decay.
        max_grad_norm: Gradients are clipped to this norm.
        max_length: Longer examples lose the middle of their prompt, then the end of their answer (both are counted and
            reported). The model's context limits them too.
        seed: Seed of all random numbers.
    """

    what: ClassVar[str]  # is trained, for errors
    batch_size: int = 8
    learning_rate: float = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        wrong = [name for name in _SIZES + _RATES if values.get(name) is not None and not values[name] > 0]
        wrong += [name for name in _SHARES if not 0 <= (values.get(name) or 0) < 1]
        wrong += ["schedule"] if self.schedule not in ("constant", "linear", "cosine") else []
        if wrong:
            raise DataError(
                f"{self.what} out of range: {', '.join(f'{name}={values[name]!r}' for name in wrong)}",
                expected="positive sizes and rates; dropout and warmup from 0 to below 1; "
                "schedule constant, linear or cosine",
            )


DROPOUT = 0.05  # where nothing else is asked for
_SIZES = ("rank", "alpha", "batch_size", "accumulation", "epochs", "steps", "max_length", "examples")
_RATES = ("learning_rate", "max_grad_norm")
_SHARES = ("dropout", "warmup")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(OptimizerSettings):
    """Settings of one training run; the defaults are the paper's: rank and layers are in section 4.1, the rest in B.

    The paper's code drops examples of 512 tokens and more; here a longer prompt loses its middle.

    Attributes:
        rank: LoRA rank ``r``.
        alpha: LoRA alpha; the scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rslora``.
        dropout: LoRA dropout, from 0 to below 1. On tokens that all prompts share, one mask serves the whole batch.
            ``None`` is 0.05, or 0 if fused parameters of a mixture of experts are trained, for which PEFT has none.
        rslora: Rank-stabilised scale.
        target_modules: PEFT's setting: ``"all-linear"`` (everything that it adapts), a regular expression, or names
            separated by commas.
        epochs: Passes over the examples.
        examples: Maximum number of training examples, from the start of the file; ``None`` for all.

    The seed determines the initial matrix, the order and the dropout.
    """

    what: ClassVar[str] = "training settings"
    rank: int = 8
    alpha: int = 16
    dropout: float | None = None
    rslora: bool = False
    target_modules: str = "all-linear"
    epochs: int = 1
    examples: int | None = None


@dataclass(frozen=True, kw_only=True)
class GateSettings(OptimizerSettings):
    """Settings of training gates. The defaults are the authors', except for the batch.

    :data:`spectr.training.AUTHORS_GATES` has theirs.

    Attributes:
        steps: Optimiser steps.
        accumulation: Batches per step, whose gradients are averaged.
        learning_rate: AdamW's learning rate.
        warmup: Share of steps with linear warm-up, from 0 to below 1.

    Source: PHATGOOSE (Muqeeth et al., 2024), section 4.
    """

    what: ClassVar[str] = "settings of the gates"
    steps: int = 100
    accumulation: int = 1
    learning_rate: float = 5e-3
    warmup: float = 0.06

    def passes(self, rows: int) -> float:
        """How often each of ``rows`` examples is seen, on average."""
        return self.steps * self.batch_size * self.accumulation / rows


AUTHORS_GATES = GateSettings(batch_size=32, accumulation=32)
"""PHATGOOSE's own: 100 steps of 1,024 examples, as its README sets ``gradient_accumulation_factor=32``."""
