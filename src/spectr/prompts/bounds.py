"""Decisions of a shortlist that are certain: by codes where these decide, else by the prototypes in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spectr.prompts.probe import Probe, Scorer
from spectr.routers.evidence import Found, PrototypeVotes

_TOGETHER = 256  # tokens that are scored at once, in float64


@runtime_checkable
class BoundedScorer(Scorer, Protocol):
    """A scorer that knows how far its scores may be off."""

    def bounded(self, x: Float[Tensor, "T I"]) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
        """Scores, float64, and how far each may be from the true one."""
        ...

    def in_full(self) -> BoundedScorer:
        """One that knows all that is known of the experts."""
        ...


@dataclass
class Certainty:
    """How shortlists came to be certain.

    Attributes:
        at_once: Lists that the codes in memory decided.
        in_full: Lists for which the prototypes were read in full.
        tied: Lists whose last expert and the next are alike, as far as float64 can tell.
    """

    at_once: int = 0
    in_full: int = 0
    tied: int = 0


class Interval(NamedTuple):
    """The least and the most that each expert's evidence can be, float64."""

    least_BE: Float[Tensor, "B E"]
    most_BE: Float[Tensor, "B E"]

    @property
    def middle_BE(self) -> Float[Tensor, "B E"]:
        """What is taken for it."""
        return (self.least_BE + self.most_BE) / 2

    def widened(self, terms: int) -> Interval:
        """By what float64 rounds in a sum of so many terms, none of them below zero."""
        rounding = 2.0**-52 * (terms + 8)
        return Interval(self.least_BE * (1 - rounding), self.most_BE * (1 + rounding))

    def decides(self, size: int) -> Bool[Tensor, " B"]:
        """Of which rows it is certain who the ``size`` first are."""
        experts = self.least_BE.shape[-1]
        if size >= experts:
            return torch.ones(len(self.least_BE), dtype=torch.bool)
        order_BE = self.middle_BE.argsort(dim=-1, descending=True)
        listed_BE, other_BE = order_BE.split([size, experts - size], dim=-1)
        return self.least_BE.gather(-1, listed_BE).amin(-1) > self.most_BE.gather(-1, other_BE).amax(-1)


class CertainProbe:
    """Reads prompts for a shortlist that is to be certain; called like a :class:`Probe`.

    Args:
        probe: Its scorers know how far their scores may be off.
        evidence: Bounds the evidence.
        size: Experts on a list.
        figures: Counts what was needed.
    """

    def __init__(self, probe: Probe, evidence: PrototypeVotes, size: int, figures: Certainty):
        self.probe, self.evidence, self.size, self.figures = probe, evidence, size, figures
        self._baseline: Interval | None = None

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Found:
        """See :class:`Probe`; float64, so that what is certain stays so."""
        self.read_baseline()
        first = found = self._above(self._read(args, kwargs))
        at_once = first.decides(self.size)
        if self.evidence.bits < 32 and not at_once.all():
            found = self._above(self._read(args, kwargs, exact=True))
        decided = at_once | found.decides(self.size)
        self.figures.at_once += int(at_once.sum())
        self.figures.in_full += int((decided & ~at_once).sum())
        self.figures.tied += int((~decided).sum())
        return Found(found.middle_BE)

    @torch.no_grad()
    def read_baseline(self) -> None:
        """See :class:`Probe`; by the prototypes in full."""
        if self._baseline is None and self.probe.baseline is not None:
            device = next(self.probe.entry.parameters()).device
            texts = {key: text.to(device) for key, text in self.probe.baseline.items()}
            read = self._read((), texts, exact=self.evidence.bits < 32)
            baseline = Interval(*(bound_BE.mean(0, keepdim=True) for bound_BE in read))
            self._baseline = baseline.widened(len(read.least_BE))

    def _above(self, read: Interval) -> Interval:
        baseline = self._baseline
        if baseline is None:
            return read
        slack_BE = 2.0**-50 * (read.most_BE + baseline.most_BE + 1)
        least_BE, most_BE = read.least_BE - baseline.most_BE + 1, read.most_BE - baseline.least_BE + 1
        return Interval(least_BE - slack_BE, most_BE + slack_BE)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, exact: bool = False) -> Interval:
        """Each expert's mean over the modules that it adapts of its mean over tokens."""
        least: dict[str, Tensor] = {}
        most: dict[str, Tensor] = {}
        tokens = 0

        def see(name: str, x_NI: Tensor, row_N: Tensor, rows: int) -> None:
            nonlocal tokens
            scorer = self.probe.scorers[name]
            assert isinstance(scorer, BoundedScorer)
            scorer = scorer.in_full() if exact else scorer
            total_2BE = torch.zeros(2, rows, len(scorer.experts), dtype=torch.float64)
            for part_NI, of_N in zip(x_NI.split(_TOGETHER), row_N.cpu().split(_TOGETHER), strict=True):
                bounds = self.evidence.bounds(*scorer.bounded(part_NI))
                for total_BE, bound_NE in zip(total_2BE, bounds, strict=True):
                    total_BE.index_add_(0, of_N, bound_NE.cpu())
            least[name], most[name] = total_2BE / row_N.cpu().bincount(minlength=rows)[:, None].clamp(min=1)
            tokens = max(tokens, len(x_NI))

        self.probe.observe(see, *args, **kwargs)
        names = {name: self.probe.scorers[name].experts for name in least}
        found = Interval(*(self.evidence.of_prompt(bound, names, self.probe.experts) for bound in (least, most)))
        return found.widened(tokens + len(names))
