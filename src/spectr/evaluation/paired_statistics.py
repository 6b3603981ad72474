"""Accuracy as a share of the fine-tuned expert's on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

from spectr.evaluation.score import Measurement


def in_words(share: Measurement) -> str:
    """A share in percent with its error; if nothing differs, with the number of examples."""
    if share.value == 1 and share.error == 0:
        return f"100%, the same on all {share.count}"
    return f"{share.value:.1%} ± {share.error:.1%}"


def mean_share(method: Mapping[str, Sequence[float]], own: Mapping[str, Sequence[float]]) -> Measurement:
    """Mean over tasks of ``mean(method) / mean(own)``, with a paired standard error.

    The error is that of a ratio of paired means (delta method). For each task, ``r = mean(m) / mean(o)`` has the
    variance ``var(m_i - r o_i) / (n mean(o)^2)``. It is 0 if a method answers like the expert: then there certainly is
    no difference, whatever the accuracy of both is. Tasks that the expert never answers correctly are left out.

    Args:
        method: By task the score of each example, from 0 to 1.
        own: The expert's, of the same examples in the same order.
    """
    ratios, variances, count = [], [], 0
    for task, expert in own.items():
        n, reference = len(expert), sum(expert) / len(expert)
        if not reference:
            continue
        ratio = sum(method[task]) / n / reference
        residues = [m - ratio * o for m, o in zip(method[task], expert, strict=True)]
        ratios.append(ratio)
        variances.append(sum(value**2 for value in residues) / max(n - 1, 1) / n / reference**2)
        count += n
    if not ratios:
        return Measurement(value=float("nan"), error=float("nan"), count=0)
    return Measurement(value=sum(ratios) / len(ratios), error=sqrt(sum(variances)) / len(ratios), count=count)


def mean_difference(method: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> Measurement:
    """Mean over tasks of ``mean(method) - mean(other)``, with a paired standard error.

    Args:
        method: By task the score of each example, from 0 to 1.
        other: The same examples in the same order.
    """
    each = [
        Measurement.of([m - o for m, o in zip(method[task], scores, strict=True)]) for task, scores in other.items()
    ]
    return Measurement(
        value=sum(m.value for m in each) / len(each),
        error=sqrt(sum(m.error**2 for m in each)) / len(each),
        count=sum(m.count for m in each),
    )
