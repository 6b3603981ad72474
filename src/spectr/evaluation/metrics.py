"""Metrics of free-text answers, from 0 to 1."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

from spectr.errors import DataError, MissingExtraError, did_you_mean
from spectr.tasks.check import TEXT_METRICS

Metric = Callable[[str, str], float]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def text_metric(name: str) -> Metric:
    """The metric of this name: a function of (answer, reference).

    ``exact_match`` is 1 if both are equal apart from case, punctuation, English articles and white space, as in SQuAD's
    evaluation. ``rouge1``, ``rouge2`` and ``rougeL`` are the F-measures of the package ``rouge-score`` with Porter's
    stemmer; they consider only the letters a to z and digits.

    Raises:
        DataError: There is no such metric for free text.
        MissingExtraError: It is a ROUGE metric, and the package is not installed.

    Source: Rajpurkar et al., 2016 (SQuAD); Lin, 2004 (ROUGE).
    """
    if name not in TEXT_METRICS:
        raise DataError(f"metric '{name}' does not measure free text", do=did_you_mean(name, TEXT_METRICS))
    return _exact_match if name == "exact_match" else _rouge(name)


def _exact_match(answer: str, reference: str) -> float:
    return float(_normalised(answer) == _normalised(reference))


def _normalised(text: str) -> str:
    lowered = text.lower()
    bare = re.sub(r"\b(a|an|the)\b", " ", lowered.translate(_PUNCTUATION))
    return " ".join((bare if bare.strip() else lowered).split())  # "a" and "%" are not both nothing


def _rouge(name: str) -> Metric:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError(f"the metric {name}", "evaluate") from error
    scorer = RougeScorer([name], use_stemmer=True)
    return lambda answer, reference: float(scorer.score(reference, answer)[name].fmeasure)
