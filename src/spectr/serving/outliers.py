"""Experts whose updates are far larger than the others': built to attract every token, or broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from spectr.adapters import BaseLayers, Expert, Factors
from spectr.lazy import lazy

THRESHOLD = 3.5
_LEAST_SPREAD = 0.35  # least spread of the logarithms: ordinary experts differ up to threefold, by length of training


def spectral_norm(expert: Expert, base: BaseLayers | None = None) -> float:
    """The root mean square over an expert's modules of its factors' largest singular value; not finite if broken.

    Args:
        expert: The expert.
        base: The layers of its base model; needed if the factors depend on them.
    """
    with _factors(expert, base) as read, torch.no_grad():
        norms = torch.stack([_norm(*read(module)) for module in expert.shapes])
    return float(norms.square().mean().sqrt())


def outlier_scores(norms: Mapping[str, float]) -> dict[str, float]:
    """Experts that stand out above the others, with the robust z-score of the norm's logarithm.

    ``z = 0.6745 (log n - median) / max(MAD, 0.35)``. Listed if ``z`` is at least 3.5, which is sixfold or more, or if
    the norm is not finite. With fewer than three experts there is no score.

    Args:
        norms: See :func:`spectral_norm`.

    Source: Iglewicz and Hoaglin (1993), the modified z-score and its threshold.
    """
    finite = {name: max(norm, 1e-30) for name, norm in norms.items() if norm < float("inf")}
    found = {name: float("inf") for name in norms if name not in finite}
    if len(finite) < 3:
        return found
    logs = torch.tensor(list(finite.values()), dtype=torch.float64).log()
    middle = logs.quantile(0.5)
    spread = max(float((logs - middle).abs().quantile(0.5)), _LEAST_SPREAD)
    scores = dict(zip(finite, (0.6745 * (logs - middle) / spread).tolist(), strict=True))
    return found | {name: score for name, score in scores.items() if score >= THRESHOLD}


def outliers_among(experts: Iterable[Expert], base: BaseLayers | None = None) -> dict[str, float]:
    """:func:`outlier_scores` of the experts among these that have factors, by :func:`spectral_norm`."""
    return outlier_scores({expert.name: spectral_norm(expert, base) for expert in experts if expert.shapes})


@contextmanager
def _factors(expert: Expert, base: BaseLayers | None) -> Iterator[Callable[[str], Factors]]:
    if base is None:
        with expert.open() as read:
            yield read
    else:
        with expert.open_on(base) as read:
            yield lambda module: read(module).factors


def _norm(A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    A, B = A_RI.float(), B_OR.float() * scale
    if not (A.isfinite().all() and B.isfinite().all()):
        return torch.tensor(float("inf"))
    return torch.linalg.matrix_norm(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT, ord=2).max()


__getattr__ = lazy(__name__, {}, renamed={"suspicion": "outlier_scores", "suspicious": "outliers_among"})
