"""Free-text answers: generated greedily, and measured against the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from spectr.evaluation.metrics import Metric
from spectr.models.generate import generate_answers
from spectr.models.text import context_length
from spectr.prompts.decision import PromptDecision
from spectr.tasks import Example

_BATCH = 16


def answer_records(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    measure: Metric,
    max_new_tokens: int,
    decision: PromptDecision | None = None,
) -> Iterator[dict[str, Any]]:
    """Each example's answer and score, in the order given; best in order of length, as neighbours share a batch.

    Args:
        model: Plain or composed.
        tokenizer: Its tokenizer.
        examples: Of free text.
        measure: Of (answer, reference).
        max_new_tokens: Length of an answer at most; a prompt that leaves no room for it loses its beginning.
        decision: Of a model that is routed by prompts; its experts are recorded as well.
    """
    context = context_length(model)
    limit = None if context is None else context - max_new_tokens
    for start in range(0, len(examples), _BATCH):
        some = examples[start : start + _BATCH]
        prompts = [example.prompt for example in some]
        answers = generate_answers(
            model,  # pyright: ignore[reportArgumentType]
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            limit=limit,
        )
        rows = [] if decision is None or decision.weights_BE is None else decision.weights_BE.tolist()
        more = [{"experts": decided(decision, row)} for row in rows] if decision and rows else [{}] * len(some)
        for example, answer, part in zip(some, answers, more, strict=True):
            score = round(measure(answer, example.answer), 5)
            yield {"answer": answer, "reference": example.answer, "score": score, **part}


def decided(decision: PromptDecision, weights_E: Sequence[float]) -> dict[str, float]:
    """The experts that a prompt was decided for, with their weights."""
    return {name: round(w, 4) for name, w in zip(decision.experts, weights_E, strict=True) if w}
