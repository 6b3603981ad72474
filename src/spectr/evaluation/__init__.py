"""Scoring a model's answers."""

from spectr.evaluation.choices import accuracy, choice_logprobs, predict, routed_logprobs
from spectr.evaluation.metrics import text_metric

__all__ = ["accuracy", "choice_logprobs", "predict", "routed_logprobs", "text_metric"]
