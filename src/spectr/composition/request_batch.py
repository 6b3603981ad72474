"""Requests of one composed model in one batch: each token chooses among its own request's experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.composition.recorder import Recorder, TokenRouting
from spectr.composition.routed import Routed
from spectr.composition.subset_probes import Readers
from spectr.layers.batch_routing import BASE, BatchRouting, routed_by
from spectr.lazy import lazy
from spectr.prompts.decision import routing_of


@dataclass(eq=False)  # equal only to itself
class RequestDecision:
    """The decision for a request's tokens. Made by :meth:`RequestBatch.decide`.

    Attributes:
        experts: The request's experts.
        among_E: A mask of these among all experts.
        verdict_E: The result for its prompt: weights or a prior; ``None`` if the router reads no prompt.
        router: Its router's name.
        p: The share of ordinary prompts with as much evidence for an expert, if known.
        abstains: Whether no expert stands out, so that the base model answers.
    """

    experts: tuple[str, ...]
    among_E: Tensor
    verdict_E: Tensor | None = None
    router: str = ""
    p: float | None = None
    abstains: bool = False

    @property
    def has_base_alone(self) -> bool:
        """Whether no expert is used."""
        return self.abstains or not self.experts


class RequestBatch:
    """Gives every token in a batch of a composed model its request's experts.

    Outputs equal those of a model that holds only these experts (:meth:`Routed.allow`), up to rounding. Call the model
    with tokens in one row, (1, tokens), inside a block of :meth:`in_force`. From now on it does not decide on prompts
    itself.

    Args:
        routed: The composed model. Call all methods from the thread that runs it, or while it does not run.
        name: The router's name in requests.
    """

    def __init__(self, routed: Routed, name: str = ""):
        self.routed, self.name = routed, name
        self._decisions: WeakSet[RequestDecision] = WeakSet()
        self._recorder: Recorder | None = None
        self._take_over()

    def decide(self, experts: Sequence[str], input_ids: Tensor | None) -> RequestDecision:
        """Decide for a request with these experts; reads its prompt if the router needs it.

        Args:
            experts: ``None`` for the base model alone.
            input_ids: The prompt, (tokens,).
        """
        names = tuple(sorted(experts))
        places = [self.routed.experts.index(name) for name in names]
        among_E = torch.zeros(len(self.routed.experts), dtype=torch.bool)
        among_E[places] = True
        decision = RequestDecision(names, among_E, router=self.name)
        if self._use is not None:
            decision.verdict_E = torch.full((len(among_E),), self._use.neutral, dtype=torch.float32)
            if names:
                assert input_ids is not None
                verdict_E, decision.p = self._verdict(names, input_ids[None])
                decision.abstains = bool((verdict_E == self._use.excluded).all())
                decision.verdict_E[places] = verdict_E
        self._decisions.add(decision)
        return decision

    def set_tokens(self, spans: Sequence[tuple[RequestDecision, int]]) -> None:
        """Assign the next calls' tokens to requests: the number of tokens of each. One span matches any length."""
        if self._layout is None or list(spans) != self._layout[0]:
            self._layout = None  # its requests may have ended
            self._layout = list(spans), self._routing_of(list(spans))

    def routing(self) -> BatchRouting:
        """The routing of these tokens."""
        routing = BASE if self._layout is None else self._layout[1]
        return routing if self._recorder is None else replace(routing, observe=self._recorder.observe)

    def in_force(self) -> AbstractContextManager[None]:
        """Route this thread's calls inside the block accordingly."""
        return routed_by(self.routing())

    def _routing_of(self, spans: list[tuple[RequestDecision, int]]) -> BatchRouting:
        decisions, counts = [decision for decision, _ in spans], torch.tensor([count for _, count in spans])
        counts = torch.ones(1, dtype=torch.long) if len(decisions) == 1 else counts
        if all(decision.has_base_alone for decision in decisions):
            return BASE
        experts = self.routed.experts
        among_1TE = torch.stack([decision.among_E for decision in decisions]).repeat_interleave(counts, 0)[None]
        if self._use is None:
            return BatchRouting(experts, among_BTE=among_1TE)
        found = [decision.verdict_E for decision in decisions if decision.verdict_E is not None]
        verdict_1TE = torch.stack(found).repeat_interleave(counts, 0)[None]
        kept = decisions if self._use.fixes else self._decisions  # all decisions in force, so that none is read twice
        verdicts = [decision.verdict_E for decision in kept if decision.verdict_E is not None]
        assert self._sets is not None
        return routing_of(self._use, experts, verdict_1TE, self._sets, torch.stack(verdicts), among_1TE)

    def watch(self, rows: Sequence[int], layers: bool) -> None:
        """Record the next call's decisions for the tokens at these positions.

        Args:
            rows: Positions along the token axis.
            layers: Whether to record each layer's decision instead of shares only.
        """
        self._recorder = Recorder(self._ordered, tuple(rows), layers) if rows else None

    def seen(self) -> list[TokenRouting]:
        """The last call's decisions for each watched token."""
        return [] if self._recorder is None else self._recorder.routings()

    def share(self, decision: RequestDecision) -> TokenRouting | None:
        """The shares of every token of a request with fixed weights; ``None`` if tokens differ."""
        if decision.has_base_alone:
            return TokenRouting({})
        if self._use is None or not self._use.fixes:
            return None
        assert decision.verdict_E is not None
        verdicts = dict(zip(self.routed.experts, decision.verdict_E.tolist(), strict=True))
        names = tuple(name for name, weight in verdicts.items() if weight > 0)
        assert self._sets is not None
        table = self._sets.table(names)
        users = Counter(name for factors in table.values() if factors is not None for name in factors.experts)
        shares = {name: verdicts[name] * users[name] / len(self._ordered) for name in names}
        return TokenRouting({name: share for name, share in shares.items() if share > 0})

    def discard(self, name: str) -> None:
        """Remove an expert; requests continue without it. See :meth:`Routed.discard`."""
        kept = [place for place, other in enumerate(self.routed.experts) if other != name]
        self.routed.discard(name)
        for decision in self._decisions:
            decision.experts = tuple(other for other in decision.experts if other != name)
            decision.among_E = decision.among_E[kept]
            decision.verdict_E = None if decision.verdict_E is None else decision.verdict_E[kept]
        self._take_over()

    def close(self) -> None:
        """Restore the model as it was composed, with all experts for every token."""
        self.routed.take()

    def _take_over(self) -> None:
        """Use the composition's layers, which are new."""
        self.routed.release()
        policy = self._policy = self.routed.policy
        self._use, self._readers = (None, None) if policy is None else (policy.use, Readers(self.routed))
        self._ordered = list(self.routed.layers.values())
        self._sets = None if self.routed.prompt is None else self.routed.prompt.sets
        self._layout: tuple[list[tuple[RequestDecision, int]], BatchRouting] | None = None

    def _verdict(self, names: tuple[str, ...], input_ids: Tensor) -> tuple[Float[Tensor, " E"], float | None]:
        """The verdict on a prompt, and the share of ordinary prompts with as much evidence."""
        assert self._policy is not None
        assert self._readers is not None
        if len(names) == 1:  # independent of the prompt
            return self._policy.use.verdict(torch.zeros(1, 1, dtype=torch.float32))[0], None
        with routed_by(BASE), torch.no_grad():
            found = self._readers.of(names)(input_ids=input_ids)
        [verdict_E] = self._policy.verdict(found).float().cpu()
        return verdict_E, None if found.p_B is None else float(found.p_B[0])


__getattr__ = lazy(__name__, {}, renamed={"Rule": "RequestDecision", "Steering": "RequestBatch"})
