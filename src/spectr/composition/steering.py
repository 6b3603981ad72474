"""Several sets of experts in one model at once: each token chooses among those of the request that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.composition.paged import Paged
from spectr.composition.readers import Readers
from spectr.composition.routed import Routed
from spectr.composition.watching import Look, Watch
from spectr.layers.decision import Held
from spectr.layers.routed import RoutedLinear
from spectr.routers import PromptRouter


@dataclass(eq=False)  # one is like itself alone
class Rule:
    """What holds for a request's tokens. Made by :meth:`Steering.rule`.

    Attributes:
        experts: Its set.
        among_E: Of all experts those in the set; of a shortlist, those on it.
        verdict_E: What was found of its prompt: weights, or a prior; ``None`` of a router that reads no prompt.
        router: Its router's name.
    """

    experts: tuple[str, ...]
    among_E: Tensor
    verdict_E: Tensor | None = None
    router: str = ""


@dataclass(eq=False)
class _Kin:
    """Layers that hold the same experts in the same shape, and what they share."""

    layers: list[RoutedLinear]
    chosen_C: Tensor
    taken: tuple[int, ...] | None = None
    held: list[Held] = field(default_factory=list)


class Steering:
    """Gives every token of a composed model's batch the set of its request.

    Outputs are those of a model that holds that set alone (:meth:`Routed.allow`), up to rounding. The model is to be
    called with tokens in one row, (1, tokens); from now on it no longer decides on prompts by itself.

    Args:
        routed: The composed model. All calls are made by the thread that runs it, or while it does not run.
        name: The router's, for its rules.
    """

    def __init__(self, routed: Routed, name: str = ""):
        self.routed, self.name = routed, name
        self._rules: WeakSet[Rule] = WeakSet()
        self._watching: Watch | None = None
        self._take_over()

    @property
    def level(self) -> str:
        """``"token"``, ``"prompt"`` (weights are held), ``"prior"`` or ``"shortlist"``."""
        router = self.routed.router
        return router.level if isinstance(router, PromptRouter) else "token"

    def rule(self, experts: Sequence[str], input_ids: Tensor | None) -> Rule:
        """What is to hold for a request with this set; its prompt is read for it, where the router wants that.

        Args:
            experts: None for the base model alone.
            input_ids: The prompt, (tokens,).
        """
        names = tuple(sorted(experts))
        places = [self.routed.experts.index(name) for name in names]
        among_E = torch.zeros(len(self.routed.experts), dtype=torch.bool)
        among_E[places] = True
        rule = Rule(names, among_E, router=self.name)
        if self.level != "token":
            rule.verdict_E = torch.ones(len(among_E)) if self.level == "prior" else torch.zeros(len(among_E))
            if names:
                assert input_ids is not None
                rule.verdict_E[places] = self._verdict(names, input_ids[None])[0].float().cpu()
        if self.level == "shortlist":
            assert rule.verdict_E is not None
            rule.among_E = rule.verdict_E != 0
        self._rules.add(rule)
        self._bring()
        return rule

    def steer(self, spans: Sequence[tuple[Rule, int]]) -> None:
        """Give the next call's tokens their rules: of each so many, one after the other; one span serves any length."""
        if list(spans) == self._layout:
            return
        self._layout = list(spans)
        rules, counts = [rule for rule, _ in spans], torch.tensor([count for _, count in spans])
        counts = torch.ones(1, dtype=torch.long) if len(rules) == 1 else counts
        awake = any(rule.experts for rule in rules)
        among_TE = torch.stack([rule.among_E for rule in rules]).repeat_interleave(counts, 0)
        found = [rule.verdict_E for rule in rules if rule.verdict_E is not None]
        verdict_TE = torch.stack(found).repeat_interleave(counts, 0) if found else None
        for kin in self._kin:
            for layer in kin.layers:
                layer.asleep = not awake
            if awake:
                self._tell(kin, among_TE, verdict_TE)

    def _tell(self, kin: _Kin, among_TE: Tensor, verdict_TE: Tensor | None) -> None:
        if self.level == "prompt":
            assert verdict_TE is not None
            _hold(kin, verdict_TE)
            return
        device = kin.layers[0].A_PI.device
        among_1TC = among_TE[:, kin.chosen_C][None].to(device)
        among = None if bool(among_1TC.all()) else among_1TC
        prior = None
        if verdict_TE is not None and getattr(self.routed.router, "informs", True):
            prior = verdict_TE[:, kin.chosen_C][None].to(device).contiguous()
        for layer in kin.layers:
            layer.among_B1E, layer.prior_B1E = among, prior

    def watch(self, rows: Sequence[int], layers: bool) -> None:
        """Have the next call remember what is decided for the tokens at these places.

        Args:
            rows: Places along the token axis.
            layers: Whether each layer's decision is wanted, or shares alone.
        """
        if not rows:
            if self._watching is not None:
                self._listen(None)
            self._watching = None
            return None
        watch = self._watching = Watch(self._ordered, tuple(rows), layers)
        return self._listen(watch)

    def _listen(self, watch: Watch | None) -> None:
        for number, layer in enumerate(self._ordered):
            layer.listen = None if watch is None else watch.ear(number, layer)

    def seen(self) -> list[Look]:
        """What the last call decided, for each watched token."""
        return [] if self._watching is None else self._watching.looks()

    def share(self, rule: Rule) -> Look | None:
        """The shares of every token of a rule whose weights are held; ``None`` where tokens differ."""
        if not rule.experts:
            return Look({})
        if self.level != "prompt":
            return None
        assert rule.verdict_E is not None
        totals_E = torch.zeros(len(rule.verdict_E))
        for kin in self._kin:
            totals_E[kin.chosen_C] += rule.verdict_E[kin.chosen_C] * len(kin.layers)
        shares = dict(zip(self.routed.experts, (totals_E / len(self._ordered)).tolist(), strict=True))
        return Look({name: share for name, share in shares.items() if share > 0})

    def discard(self, name: str) -> None:
        """Forget an expert; rules that hold stay in force, less this expert. See :meth:`Routed.discard`."""
        kept = [place for place, other in enumerate(self.routed.experts) if other != name]
        self.routed.discard(name)
        for rule in self._rules:
            rule.experts = tuple(other for other in rule.experts if other != name)
            rule.among_E = rule.among_E[kept]
            rule.verdict_E = None if rule.verdict_E is None else rule.verdict_E[kept]
        self._take_over()
        self._bring()

    def close(self) -> None:
        """Leave the model as it was composed, with all experts for every token."""
        for layer in self._ordered:
            layer.asleep, layer.listen = False, None
            layer.hold(None)
            layer.inform(None)
            layer.narrow(None)
        self.routed.allow(self.routed.experts)

    def _take_over(self) -> None:
        """From the composition, whose layers are new ones."""
        if self.routed.prompt is not None:
            self.routed.prompt.close()
        self._readers = Readers(self.routed)
        self._ordered = list(self.routed.layers.values())
        self._look_at_layers()

    def _bring(self) -> None:
        """Have the layers hold what the rules in force choose, where they do not hold everything."""
        routed = self.routed
        if not isinstance(routed, Paged):
            return
        verdicts = [rule.verdict_E for rule in self._rules if rule.verdict_E is not None]
        taken_E = torch.stack(verdicts).any(0).tolist()
        needed = {name for name, taken in zip(routed.experts, taken_E, strict=True) if taken}
        if not needed <= set(routed.filled):
            routed.bring(sorted(needed))
            self._look_at_layers()

    def _look_at_layers(self) -> None:
        self._layout: list[tuple[Rule, int]] | None = None
        kin: dict[object, _Kin] = {}
        for layer in self._ordered:
            if not layer.experts:
                continue
            alike = (layer.experts, layer.ranks, layer.A_PI.device, layer.A_PI.dtype)
            chosen = torch.tensor([self.routed.experts.index(name) for name in layer.experts])
            kin.setdefault(alike, _Kin([], chosen)).layers.append(layer)
        self._kin = list(kin.values())

    def _verdict(self, names: tuple[str, ...], input_ids: Tensor) -> Float[Tensor, "B E"]:
        router = self.routed.router
        assert isinstance(router, PromptRouter)
        self._layout = None
        with _asleep(self._ordered), torch.no_grad():
            return router.verdict(self._readers.of(names)(input_ids=input_ids))


def _hold(kin: _Kin, weights_TE: Float[Tensor, "T E"]) -> None:
    """As :meth:`RoutedLinear.hold`, a row for each token; factors are gathered only where others take part."""
    weights_TC = weights_TE[:, kin.chosen_C]
    taken = tuple((weights_TC != 0).any(0).nonzero()[:, 0].tolist())
    if taken != kin.taken:
        union_1C = torch.zeros(1, weights_TC.shape[1])
        union_1C[:, list(taken)] = 1.0
        for layer in kin.layers:
            layer.hold(union_1C)
        kin.taken, kin.held = taken, [layer.held for layer in kin.layers if layer.held is not None]
    first = kin.held[0]
    weights_1TC = weights_TC[None].to(first.owner_P.device)
    taken_1TN = weights_1TC[..., list(taken)]
    weights_1TP = taken_1TN[..., first.owner_P].to(first.A_PI.dtype).contiguous()
    for layer, held in zip(kin.layers, kin.held, strict=True):
        layer.held = held._replace(weights_B1E=taken_1TN, weights_B1P=weights_1TP, all_weights_B1E=weights_1TC)


@contextmanager
def _asleep(layers: Sequence[RoutedLinear]) -> Iterator[None]:
    """With the base model alone."""
    before = [layer.asleep for layer in layers]
    for layer in layers:
        layer.asleep = True
    try:
        yield
    finally:
        for layer, asleep in zip(layers, before, strict=True):
            layer.asleep = asleep
