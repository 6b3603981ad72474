"""Exact decisions of a shortlist: by the codes in memory if these decide, else by the full prototypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectr.layers.linear_layers import input_device
from spectr.prompts.probe import Probe, Scorer
from spectr.routers.evidence import Found, PrototypeMeans
from spectr.routers.evidence.score_means import LEAST_SPREAD, NO_EVIDENCE, largest, left_out, p_value

_TOGETHER = 256  # tokens that are scored at once, in float64


@runtime_checkable
class BoundedScorer(Scorer, Protocol):
    """A scorer that knows the error of its scores."""

    def bounded(self, x: Float[Tensor, "T I"]) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        """Scores, float64, and the largest error of each."""
        ...

    def in_full(self) -> BoundedScorer:
        """A scorer with the full prototypes."""
        ...


@dataclass
class Certainty:
    """Counts how exact shortlists were decided.

    Attributes:
        at_once: Lists that the codes in memory decided.
        in_full: Lists for which the full prototypes were read.
        tied: Lists whose last expert and the next are equal within float64.
    """

    at_once: int = 0
    in_full: int = 0
    tied: int = 0


class Interval(NamedTuple):
    """Lower and upper bounds of numbers, float64."""

    least: Float[Tensor, "*N E"]
    most: Float[Tensor, "*N E"]

    @property
    def middle(self) -> Float[Tensor, "*N E"]:
        """The value that is used for it."""
        return (self.least + self.most) / 2

    def widened(self, terms: int) -> Interval:
        """Widened by float64's rounding in sums of this many terms: token means, logarithms, module means."""
        slack = 2.0**-47 * (terms + 64)  # logarithms are below 2^5
        return Interval(self.least - slack, self.most + slack)

    def decides(self, size: int) -> Bool[Tensor, " B"]:
        """For each row, whether the first ``size`` experts are certain."""
        experts = self.least.shape[-1]
        if size >= experts:
            return torch.ones(len(self.least), dtype=torch.bool)
        order_BE = self.middle.argsort(dim=-1, descending=True)
        listed_BE, other_BE = order_BE.split([size, experts - size], dim=-1)
        return self.least.gather(-1, listed_BE).amin(-1) > self.most.gather(-1, other_BE).amax(-1)

    def standardised(self, null: Interval) -> Interval:
        """Standardised by the mean and standard deviation of others; both over the second-last axis.

        If each of K values moves by 1, a standard deviation moves by at most ``(K / (K - 1))^0.5``.
        """
        texts = null.least.shape[-2]
        mean = Interval(null.least.mean(-2, keepdim=True), null.most.mean(-2, keepdim=True)).widened(texts)
        off = ((null.most - null.least) / 2).amax(-2, keepdim=True) * (texts / max(1, texts - 1)) ** 0.5
        off = off + 2.0**-47 * (texts + 64)
        spread = null.middle.std(-2, keepdim=True, correction=min(1, texts - 1))
        narrow, wide = ((spread + by).clamp(min=LEAST_SPREAD) for by in (-off, off))
        least, most = self.least - mean.most, self.most - mean.least
        return Interval(
            torch.where(least < 0, least / narrow, least / wide), torch.where(most < 0, most / wide, most / narrow)
        ).widened(0)


class CertainProbe:
    """Reads prompts for an exact shortlist; called like a :class:`Probe`.

    Args:
        probe: Its scorers know the errors of their scores.
        evidence: Bounds the evidence.
        size: Experts on a list.
        figures: Counts how lists were decided.
        abstain: The share of ordinary prompts above which the base model answers; ``None`` if it never does.
    """

    def __init__(
        self, probe: Probe, evidence: PrototypeMeans, size: int, figures: Certainty, abstain: float | None = None
    ):
        self.probe, self.evidence, self.size, self.figures, self.abstain = probe, evidence, size, figures, abstain
        self._null: Interval | None = None

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Found:
        """See :class:`Probe`; float64, so that exact bounds stay exact."""
        self.read_null()
        found, p = self._found(self._read(args, kwargs))
        at_once = decided = self._decides(found, p)
        if self.evidence.bits < 32 and not at_once.all():
            found, p = self._found(self._read(args, kwargs, exact=True))
            decided = at_once | self._decides(found, p)
        self.figures.at_once += int(at_once.sum())
        self.figures.in_full += int((decided & ~at_once).sum())
        self.figures.tied += int((~decided).sum())
        return Found(found.middle, p.middle if self.probe.null.ordinary else None)

    def _decides(self, found: Interval, p: Interval) -> Bool[Tensor, " B"]:
        """For each row, whether both the list and abstention are certain."""
        level = self.abstain if self.probe.null.ordinary else None
        listed = found.decides(self.size)
        return listed if level is None else (p.least > level) | (listed & (p.most <= level))

    @torch.no_grad()
    def read_null(self) -> None:
        """See :class:`Probe`; uses the full prototypes."""
        if self._null is None:
            device, exact = input_device(self.probe.entry), self.evidence.bits < 32
            read = [self._read((), batch, exact=exact) for batch in self.probe.null.on(device)]
            self._null = Interval(*(torch.cat(parts, dim=1) for parts in zip(*read, strict=True)))

    def _found(self, read: Interval) -> tuple[Interval, Interval]:
        """The evidence, and the share of the null that stands out as much."""
        assert self._null is not None
        z, null_z = read.standardised(self._null), self._null.standardised(self._null)
        texts = self._null.least.shape[1]
        null_z = Interval(*(left_out(bound, texts) for bound in null_z)).widened(0)
        alike_2E = self._null.middle.std(1, correction=min(1, texts - 1)) < LEAST_SPREAD
        alike_2E[0] = False
        z, null_z = (
            Interval(*(bound.masked_fill(alike_2E[:, None], torch.nan) for bound in some)) for some in (z, null_z)
        )
        largest_B, null_K = (Interval(*map(largest, some)) for some in (z, null_z))
        p = Interval(p_value(largest_B.most, null_K.least), p_value(largest_B.least, null_K.most))
        return Interval(*(bound.nanmean(0).nan_to_num(nan=NO_EVIDENCE) for bound in z)).widened(0), p

    def _read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, exact: bool = False) -> Interval:
        """The evidence's numbers for each expert, (numbers, batch, experts)."""
        least: dict[str, Tensor] = {}
        most: dict[str, Tensor] = {}
        tokens = 0

        def see(name: str, x_NI: Any, row_N: Tensor, rows: int) -> None:
            nonlocal tokens
            scorer = self.probe.scorers[name]
            assert isinstance(scorer, BoundedScorer)
            scorer = scorer.in_full() if exact else scorer
            total_2QBE = torch.zeros(2, 2, rows, len(scorer.experts), dtype=torch.float64)
            for part_NI, of_N in zip(x_NI.split(_TOGETHER), row_N.cpu().split(_TOGETHER), strict=True):
                bounds = self.evidence.token_bounds(*scorer.bounded(part_NI))
                for total_QBE, bound_QNE in zip(total_2QBE, bounds, strict=True):
                    total_QBE.index_add_(1, of_N, bound_QNE.cpu())
            count_B1 = row_N.cpu().bincount(minlength=rows)[:, None].clamp(min=1)
            least[name], most[name] = self.evidence.logarithms(total_2QBE / count_B1)
            tokens = max(tokens, len(x_NI))

        self.probe.observe(see, *args, **kwargs)
        names = {name: self.probe.scorers[name].experts for name in least}
        found = Interval(*(self.evidence.of_prompt(bound, names, self.probe.experts) for bound in (least, most)))
        return found.widened(tokens + len(names))
