"""Prompts that are read for a decision: the base model computes them, and every layer's scores of them are kept.

Such a request (a probe) is like any other to the engine, in pieces and beside others, but uses no cached prefix.
Legend: N tokens of a step that have a say, P rows of factors, S packed modules, E experts, I inputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spectr.prompts.probe import evidence_among
from spectr.routers.evidence import ModuleScores
from spectr.vllm.requests import Asked

_KEPT = 1024  # verdicts that nobody has asked for yet
_SETS = 256  # of which it is remembered what is usual


class Row(NamedTuple):
    """What a request has in a step.

    Attributes:
        request: The engine's name for it.
        asked: What it asks for.
        before: How many of its tokens were computed before.
        tokens: How many are in the step.
        prompt: How many its prompt has.
    """

    request: str
    asked: Asked
    before: int
    tokens: int
    prompt: int


class _Part(NamedTuple):
    request: str
    tokens: int


class Hearing:
    """The probes of one worker.

    Args:
        routers: Policies for whole prompts, by their routers' names.
        modules: By routed module its experts' names.

    Attributes:
        rows_N: Of the current step the tokens that have a say; ``None`` where there is none.
    """

    def __init__(self, routers: Mapping[str, Any], modules: Mapping[str, Sequence[str]]):
        self.routers, self.modules = routers, modules
        self.rows_N: Tensor | None = None
        self._parts: list[_Part] = []
        self._complete: list[Row] = []
        self._heard: dict[str, dict[str, list[Tensor]]] = {}
        self._awaited: set[str] = set()
        self._usual: list[dict[str, ModuleScores]] = []
        self._usual_E: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        self._verdicts = OrderedDict[str, dict[str, float]]()

    def begin(self, step: Sequence[Row], alive: Collection[str], device: torch.device) -> None:
        """What is in the step that comes; what was heard of requests that are gone is let go."""
        self._heard = {request: heard for request, heard in self._heard.items() if request in alive}
        self._parts, self._complete, rows, start = [], [], [], 0
        for row in step:
            if row.asked.probe:
                if row.before == 0:  # anew, where the engine had taken its memory
                    self._heard[row.request] = {}
                first, end = max(row.before, row.asked.unheard), min(row.before + row.tokens, row.prompt)
                if first < end:
                    rows.append(torch.arange(first, end) - row.before + start)
                    self._parts.append(_Part(row.request, end - first))
                if row.before < row.prompt <= row.before + row.tokens:
                    self._complete.append(row)
            start += row.tokens
        self.rows_N = torch.cat(rows).to(device) if rows else None

    def take(self, module: str, scores_NE: Float[Tensor, "N E"]) -> None:
        """A module's scores of the step's tokens that have a say."""
        pieces = scores_NE.split([part.tokens for part in self._parts])
        for part, piece_NE in zip(self._parts, pieces, strict=True):
            self._heard[part.request].setdefault(module, []).append(piece_NE)

    def end(self, removed: Collection[str]) -> None:
        """The step is computed: decide on the prompts that it has completed."""
        for row in self._complete:
            heard = {module: _joined(pieces) for module, pieces in self._heard.pop(row.request).items()}
            if row.asked.probe in self._awaited:
                self._awaited.discard(row.asked.probe)
                self._usual.append(heard)
                self._usual_E.clear()
            elif row.asked.router in self.routers:
                names = tuple(sorted(set(row.asked.among) - set(removed)))
                self._verdicts[row.asked.probe] = self._decide(heard, row.asked.router, names)
        while len(self._verdicts) > _KEPT:
            self._verdicts.popitem(last=False)
        self.rows_N, self._parts, self._complete = None, [], []

    def learn(self, probes: Iterable[str]) -> None:
        """These probes are the calibration's texts, and say what is usual."""
        self._awaited, self._usual, self._usual_E = set(probes), [], {}

    def verdict(self, probe: str) -> dict[str, float]:
        """The weights that are held for the prompt of a probe, or its prior; of no expert where it is not known."""
        return self._verdicts.pop(probe, {})

    def _decide(self, heard: Mapping[str, ModuleScores], name: str, experts: tuple[str, ...]) -> dict[str, float]:
        if len(experts) < 2:
            return dict.fromkeys(experts, 1.0)
        policy = self.routers[name]
        evidence_1E = evidence_among(heard, self.modules, policy.evidence, experts)
        if self._usual:
            evidence_1E = policy.evidence.above(evidence_1E, self._usual_among(name, experts))
        [verdict_E] = policy.use.verdict(evidence_1E)
        found = dict(zip(experts, verdict_E.tolist(), strict=True))
        return {expert: number for expert, number in found.items() if number > 0 or not policy.use.fixes}

    def _usual_among(self, name: str, experts: tuple[str, ...]) -> Tensor:
        """These experts' evidence from the calibration's texts, which takes longer than a prompt's, and stays."""
        if (name, experts) not in self._usual_E:
            if len(self._usual_E) >= _SETS:
                self._usual_E.clear()
            evidence = self.routers[name].evidence
            texts = [evidence_among(text, self.modules, evidence, experts) for text in self._usual]
            self._usual_E[name, experts] = torch.cat(texts)
        return self._usual_E[name, experts]


class Ear(nn.Module):
    """What scores the tokens of probes at one layer.

    Args:
        hearing: The worker's.
        by: See :meth:`hear_by`.
    """

    A_PI: Tensor

    def __init__(self, hearing: Hearing, *by: Any):
        super().__init__()
        define()
        self.hearing = hearing
        self.hear_by(*by)

    def hear_by(
        self,
        A_PI: Float[Tensor, "P I"],
        groups: Sequence[tuple[Any, Sequence[str]]],
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        """Score by these from now on.

        Args:
            A_PI: The input factors of all modules, one below the other.
            groups: What scores them, in their order, each with the names of its modules.
            reduce: Sums ``A x`` over the ranks, where the layer sees a part of its input on each.
        """
        self.register_buffer("A_PI", A_PI, persistent=False)
        self.groups, self.reduce = tuple(groups), reduce

    def forward(self, x_TI: Float[Tensor, "T I"]) -> None:
        """Score those tokens of a step that have a say."""
        rows_N = self.hearing.rows_N
        if rows_N is None:
            return
        x_NI = x_TI[rows_N]
        h_NQ, start = self.reduce(x_NI @ self.A_PI.mT), 0
        for group, names in self.groups:
            rows = group.modules_S * group.rows
            h_NSP = h_NQ[:, start : start + rows].unflatten(-1, (group.modules_S, group.rows))
            scores_NSE = group.scores(h_NSP, x_NI)
            for module, scores_NE in zip(names, scores_NSE.unbind(1), strict=True):
                self.hearing.take(module, scores_NE)
            start += rows


def key_of(name: str) -> str:
    """A layer's key among those that the engine finds by name."""
    return f"{name}.spectr.ear"


@cache
def define() -> torch.library.Library:
    """The operation by which graphs let a layer hear its input; it is said to change the output, so that it stays."""
    from vllm.forward_context import get_forward_context

    def hear(out: Tensor, x: Tensor, name: str) -> None:
        get_forward_context().no_compile_layers[key_of(name)](x)

    ours = torch.library.Library("spectr", "FRAGMENT")
    ours.define("hear(Tensor(a!) out, Tensor x, str name) -> ()")
    ours.impl("hear", hear, "CompositeExplicitAutograd")
    torch.library.register_fake("spectr::hear", lambda out, x, name: None)
    return ours


def _joined(pieces: Sequence[Tensor]) -> ModuleScores:
    scores_NE = torch.cat(list(pieces))
    return ModuleScores(scores_NE, torch.zeros(len(scores_NE), dtype=torch.long, device=scores_NE.device), 1)
