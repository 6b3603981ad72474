"""What a training run came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spectr.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run came to; also the data of the expert's card.

    Attributes:
        validation_accuracy: After each epoch, from 0 to 1; the weights are those of the best, the first of equals.
        metric: What the accuracies are: ``"accuracy"`` of choices, or a metric of free text.
        accuracy_before: The base model's, on the test examples, from 0 to 1; ``None`` without test data.
        accuracy_after: The expert's, measured on the weights as saved.
        majority: Share of the most frequent label, where labels mean the same in every row.
    """

    name: str
    base_model: str
    settings: TrainingSettings
    metric: str
    data: dict[str, Any]
    train_examples: int
    test_examples: int
    validation_examples: int
    steps: int
    shortened_prompts: int
    last_loss: float
    validation_accuracy: list[float]
    accuracy_before: float | None
    accuracy_after: float | None
    majority: float | None
    seconds: float
