"""Prompts that the base model reads for a decision, with the scores of every layer.

The engine treats such a request (a probe) like any other: it may compute it in chunks, and in one batch with others.
A probe uses no cached prefix.
Legend: N tokens of a step that count, P rows of factors, S packed modules, E experts, I inputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.prompts.probe import numbers_among
from spectr.routers.evidence import ModuleScores
from spectr.vllm.requests import RequestOptions

_KEPT = 1024  # most verdicts that wait to be fetched
_SETS = 256  # most sets of experts whose null is cached


class Row(NamedTuple):
    """A request's part of a step.

    Attributes:
        request: The engine's id of the request.
        options: The request's routing options.
        before: Number of tokens computed before this step.
        tokens: Number of tokens in this step.
        prompt: Number of tokens in its prompt.
    """

    request: str
    options: RequestOptions
    before: int
    tokens: int
    prompt: int


class Verdict(NamedTuple):
    """The result of a prompt's probe.

    Attributes:
        numbers: The experts' fixed weights or prior, by name. If empty, the base model answers.
        p: The share of ordinary prompts with at least as much evidence, if known.
    """

    numbers: dict[str, float]
    p: float | None = None


class Probes:
    """The probes of one worker.

    Args:
        routers: The library's policies for whole prompts, by router name.
        modules: The names of each routed module's experts.

    Attributes:
        rows_N: The tokens of the current step that count, or ``None``.
    """

    def __init__(self, routers: Mapping[str, Any], modules: Mapping[str, Sequence[str]]):
        self.routers, self.modules = routers, modules
        self.rows_N: Tensor | None = None
        self._parts: list[tuple[str, int]] = []  # a request, and how many of its tokens count
        self._complete: list[Row] = []
        self._scores: dict[str, dict[str, list[Tensor]]] = {}
        self._awaited: set[str] = set()
        self._null: list[dict[str, ModuleScores]] = []
        self._ordinary = False
        self._null_among: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        self._verdicts = OrderedDict[str, Verdict]()

    def begin(self, step: Sequence[Row], alive: Collection[str], device: torch.device) -> None:
        """Prepare for the next step, and drop the scores of requests that have ended."""
        self._scores = {request: scores for request, scores in self._scores.items() if request in alive}
        self._parts, self._complete, rows, start = [], [], [], 0
        for row in step:
            if row.options.probe:
                if row.before == 0:  # start again if the engine preempted it
                    self._scores[row.request] = {}
                first, end = max(row.before, row.options.skipped), min(row.before + row.tokens, row.prompt)
                if first < end:
                    rows.append(torch.arange(first, end) - row.before + start)
                    self._parts.append((row.request, end - first))
                if row.before < row.prompt <= row.before + row.tokens:
                    self._complete.append(row)
            start += row.tokens
        self.rows_N = torch.cat(rows).to(device) if rows else None

    def take(self, module: str, scores_NE: Float[Tensor, "N E"]) -> None:
        """Receive a module's scores of the step's tokens that count."""
        pieces = scores_NE.split([tokens for _, tokens in self._parts])
        for (request, _), piece_NE in zip(self._parts, pieces, strict=True):
            self._scores[request].setdefault(module, []).append(piece_NE)

    def end(self, removed: Collection[str]) -> None:
        """Decide on the prompts that this step has completed."""
        for row in self._complete:
            scores = {module: _joined(pieces) for module, pieces in self._scores.pop(row.request).items()}
            if row.options.probe in self._awaited:
                self._awaited.discard(row.options.probe)
                self._null.append({module: _on_cpu(rows) for module, rows in scores.items()})
                self._null_among.clear()
            elif row.options.router in self.routers:
                names = tuple(sorted(set(row.options.among) - set(removed)))
                self._verdicts[row.options.probe] = self._decide(scores, row.options.router, names)
        while len(self._verdicts) > _KEPT:
            self._verdicts.popitem(last=False)
        self.rows_N, self._parts, self._complete = None, [], []

    def read_null(self, probes: Iterable[str], ordinary: bool) -> None:
        """Use these probes as the texts that prompts are compared with.

        Args:
            probes: The probes' ids.
            ordinary: See :class:`spectr.prompts.probe.Null`.
        """
        self._awaited, self._ordinary, self._null, self._null_among = set(probes), ordinary, [], {}

    def verdict(self, probe: str) -> Verdict:
        """The verdict on a probe's prompt, or ``None`` for an unknown probe."""
        return self._verdicts.pop(probe, Verdict({}))

    def _decide(self, scores: Mapping[str, ModuleScores], name: str, experts: tuple[str, ...]) -> Verdict:
        if len(experts) < 2:
            return Verdict(dict.fromkeys(experts, 1.0))
        policy = self.routers[name]
        numbers_Q1E = numbers_among(scores, self.modules, policy.evidence, experts)
        found = policy.evidence.compare(numbers_Q1E, self._null_of(name, experts), ordinary=self._ordinary)
        numbers = zip(experts, policy.verdict(found)[0].tolist(), strict=True)
        taking = {expert: number for expert, number in numbers if number != policy.use.excluded}
        return Verdict(taking, None if found.p_B is None else float(found.p_B[0]))

    def _null_of(self, name: str, experts: tuple[str, ...]) -> Float[Tensor, "Q K E"]:
        """The null's evidence for these experts, cached."""
        if (name, experts) not in self._null_among:
            if len(self._null_among) >= _SETS:
                self._null_among.clear()
            evidence = self.routers[name].evidence
            self._null_among[name, experts] = numbers_among(_together(self._null), self.modules, evidence, experts)
        return self._null_among[name, experts]


class ProbeScorer(nn.Module):
    """Scores the tokens of probes at one layer.

    Args:
        probes: The worker's probes.
        by: See :meth:`score_by`.
    """

    A_PI: Tensor

    def __init__(self, probes: Probes, *by: Any):
        super().__init__()
        define()
        self.probes = probes
        self.score_by(*by)

    def score_by(
        self,
        A_PI: Float[Tensor, "P I"],
        groups: Sequence[tuple[Any, Sequence[str]]],
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        """Set the factors and groups that score from now on.

        Args:
            A_PI: The input factors of all modules, concatenated along P.
            groups: The groups that score them, in order, each with the names of its modules.
            reduce: Sums ``A x`` over the ranks, if the layer sees only a part of its input on each.
        """
        self.register_buffer("A_PI", A_PI, persistent=False)
        self.groups, self.reduce = tuple(groups), reduce

    def forward(self, x_TI: Float[Tensor, "T I"]) -> None:
        """Score the tokens of a step that count."""
        rows_N = self.probes.rows_N
        if rows_N is None:
            return
        x_NI = x_TI[rows_N]
        h_NQ, start = self.reduce(x_NI @ self.A_PI.mT), 0
        for group, names in self.groups:
            rows = group.modules_S * group.rows
            h_NSP = h_NQ[:, start : start + rows].unflatten(-1, (group.modules_S, group.rows))
            scores_NSE = group.scores(h_NSP, x_NI)
            for module, scores_NE in zip(names, scores_NSE.unbind(1), strict=True):
                self.probes.take(module, scores_NE)
            start += rows


def key_of(name: str) -> str:
    """The key under which the engine finds a layer by name."""
    return f"{name}.spectr.probe_scorer"


@cache
def define() -> torch.library.Library:
    """The operation that scores a layer's input in graphs. It claims to change the output, so that graphs keep it."""
    from vllm.forward_context import get_forward_context

    def score_probe(out: Tensor, x: Tensor, name: str) -> None:
        get_forward_context().no_compile_layers[key_of(name)](x)

    ours = torch.library.Library("spectr", "FRAGMENT")
    ours.define("score_probe(Tensor(a!) out, Tensor x, str name) -> ()")
    ours.impl("score_probe", score_probe, "CompositeExplicitAutograd")
    torch.library.register_fake("spectr::score_probe", lambda out, x, name: None)
    return ours


def _joined(pieces: Sequence[Tensor]) -> ModuleScores:
    scores_NE = torch.cat(list(pieces))
    return ModuleScores(scores_NE, torch.zeros(len(scores_NE), dtype=torch.long, device=scores_NE.device), 1)


def _together(texts: Sequence[Mapping[str, ModuleScores]]) -> dict[str, ModuleScores]:
    """The scores of all texts as one batch, with a row for each text."""
    found = {}
    for module in dict.fromkeys(module for text in texts for module in text):
        rows = [(row, text[module].scores_NE) for row, text in enumerate(texts) if module in text]
        row_N = torch.cat([torch.full((len(scores_NE),), row) for row, scores_NE in rows])
        found[module] = ModuleScores(torch.cat([scores_NE for _, scores_NE in rows]), row_N, len(texts))
    return found


def _on_cpu(rows: ModuleScores) -> ModuleScores:
    return rows._replace(scores_NE=rows.scores_NE.cpu(), row_N=rows.row_N.cpu())
