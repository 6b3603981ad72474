"""Scoring a model's answers."""

from spectr.evaluation.choices import accuracy, choice_logprobs, predict, routed_logprobs

__all__ = ["accuracy", "choice_logprobs", "predict", "routed_logprobs"]
