"""Score a model's answers."""

from typing import TYPE_CHECKING

from spectr.lazy import lazy

if TYPE_CHECKING:
    from spectr.evaluation.choices import accuracy, choice_logprobs, predict, routed_logprobs
    from spectr.evaluation.score import text_metric

__all__ = ["accuracy", "choice_logprobs", "predict", "routed_logprobs", "text_metric"]
__getattr__ = lazy(
    __name__,
    {
        "accuracy": "choices",
        "choice_logprobs": "choices",
        "predict": "choices",
        "routed_logprobs": "choices",
        "text_metric": "score",
    },
)
