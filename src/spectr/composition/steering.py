"""Several sets of experts in one model at once: each token chooses among those of the request that it belongs to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.composition.routed import Routed, calibration_texts
from spectr.errors import CompositionError
from spectr.layers.decision import Held
from spectr.layers.opening import Opening
from spectr.layers.probe import Heard, Probe
from spectr.layers.prompt import Reader, entry_of
from spectr.layers.routed import RoutedLinear
from spectr.routers import ProbingRouter, PromptRouter, Shortlist

_READERS = 64  # sets whose reader is kept


class Look(NamedTuple):
    """What was decided for one token.

    Attributes:
        shares: Each expert's weight summed over the routed layers, divided by their number.
        layers: Where it was asked for, by layer the chosen experts, ``{name: (weight, score)}``.
    """

    shares: Mapping[str, float]
    layers: tuple[Mapping[str, tuple[float, float]], ...] = ()


@dataclass(eq=False)  # one is like itself alone
class Rule:
    """What holds for a request's tokens. Made by :meth:`Steering.rule`.

    Attributes:
        experts: Its set.
        among_E: Of all experts those in the set.
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

    Raises:
        CompositionError: The router cannot be steered, or its weights cannot differ between tokens.
    """

    def __init__(self, routed: Routed, name: str = ""):
        if isinstance(routed.router, Shortlist):
            raise CompositionError(
                f"{routed.router} makes a shortlist before it looks at a request's own experts",
                expected="a router that scores all experts, such as calibrated or spectr",
                do="choose another with --router",
            )
        self.routed, self.name = routed, name
        self._rules: WeakSet[Rule] = WeakSet()
        self._watching: _Watch | None = None
        self._look_at_layers()

    @property
    def level(self) -> str:
        """``"token"``, ``"prompt"`` (weights are held) or ``"prior"``."""
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
            rule.verdict_E = torch.zeros(len(among_E)) if self.level == "prompt" else torch.ones(len(among_E))
            if names:
                assert input_ids is not None
                rule.verdict_E[places] = self._verdict(names, input_ids[None])[0].float().cpu()
        self._rules.add(rule)
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
        prior = None if verdict_TE is None else verdict_TE[:, kin.chosen_C][None].to(device).contiguous()
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
        watch = self._watching = _Watch(self.routed.layers, self.routed.experts, tuple(rows), layers)
        return self._listen(watch)

    def _listen(self, watch: _Watch | None) -> None:
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
        self._look_at_layers()

    def close(self) -> None:
        """Leave the model as it was composed, with all experts for every token."""
        for layer in self._ordered:
            layer.asleep, layer.listen = False, None
            layer.hold(None)
            layer.inform(None)
            layer.narrow(None)
        self.routed.allow(self.routed.experts)

    def _look_at_layers(self) -> None:
        if self.routed.prompt is not None:
            self.routed.prompt.close()
        self._layout: list[tuple[Rule, int]] | None = None
        self._readers: OrderedDict[tuple[str, ...], Reader] = OrderedDict()
        self._heard: dict[str, Heard] | None = None
        self._ordered = list(self.routed.layers.values())
        kin: dict[object, _Kin] = {}
        for layer in self._ordered:
            alike = (layer.experts, layer.ranks, layer.A_PI.device, layer.A_PI.dtype)
            chosen = torch.tensor([self.routed.experts.index(name) for name in layer.experts])
            kin.setdefault(alike, _Kin([], chosen)).layers.append(layer)
        self._kin = list(kin.values())

    def _verdict(self, names: tuple[str, ...], input_ids: Tensor) -> Float[Tensor, "B E"]:
        router = self.routed.router
        assert isinstance(router, PromptRouter)
        self._layout = None
        with _asleep(self._ordered), torch.no_grad():
            if names not in self._readers:
                self._readers[names] = self._reader(names, router)
                while len(self._readers) > _READERS:
                    self._readers.popitem(last=False)
            self._readers.move_to_end(names)
            return router.verdict(self._readers[names](input_ids=input_ids))

    def _reader(self, names: tuple[str, ...], router: PromptRouter) -> Reader:
        """What reads a prompt for this set, as it would where nothing else is there."""
        routed = self.routed
        if not isinstance(router, ProbingRouter):
            assert routed.guide is not None
            return routed.guide.reader(routed.library.descriptions, names)
        voters = {module: _Voter(layer, names) for module, layer in routed.layers.items()}
        voters = {module: voter for module, voter in voters.items() if voter.experts}
        layers = {module: layer for module, layer in routed.layers.items() if module in voters}
        opening, usual = calibration_texts(routed.library.calibration)
        usual_E = None if usual is None else self._usual(router, opening, usual, names)
        return Probe(entry_of(routed.model), layers, voters, router, names, opening, usual_E=usual_E)

    def _usual(
        self, router: ProbingRouter, opening: Opening | None, texts: Mapping[str, Tensor], names: tuple[str, ...]
    ) -> Tensor:
        """What a set's experts have on the calibration's texts, which are read once for all sets."""
        routed = self.routed
        probe = Probe(entry_of(routed.model), routed.layers, routed.layers, router, routed.experts, opening)
        if self._heard is None:
            device = next(routed.model.parameters()).device
            self._heard = probe.hear(**{key: text.to(device) for key, text in texts.items()})
        return probe.evidence_of(self._heard, names).mean(0)


class _Voter:
    """Some of a layer's experts, as they would score without the others."""

    def __init__(self, layer: RoutedLinear, names: tuple[str, ...]):
        self._layer = layer
        self._places = [place for place, name in enumerate(layer.experts) if name in names]
        self.experts = tuple(layer.experts[place] for place in self._places)

    def scores(self, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T E"]:
        return self._layer.scores(x)[..., self._places]


class _Watch:
    """One call's decisions for some of its tokens."""

    def __init__(
        self, layers: Mapping[str, RoutedLinear], experts: Sequence[str], rows: tuple[int, ...], in_full: bool
    ):
        self._experts, self._rows, self._in_full = tuple(experts), rows, in_full
        self._held = [layer.experts for layer in layers.values()]
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def ear(self, number: int, layer: RoutedLinear) -> Callable[[Tensor], None]:
        def hear(x: Tensor) -> None:
            if not layer.asleep:
                self._found[number] = _explain(layer, x, self._rows)

        return hear

    def looks(self) -> list[Look]:
        found = self._gathered()
        return [Look(self._shares(found, row), self._layers(found, row)) for row in range(len(self._rows))]

    def _gathered(self) -> dict[int, tuple[list[list[float]], list[list[float]]]]:
        """Scores and weights by layer, fetched for all layers of one shape at once."""
        alike: dict[object, list[int]] = {}
        for number, (scores_NC, _) in self._found.items():
            alike.setdefault((scores_NC.shape, scores_NC.device), []).append(number)
        found = {}
        for numbers in alike.values():
            both = torch.stack([torch.stack(self._found[number]) for number in numbers]).tolist()
            found |= {number: tuple(pair) for number, pair in zip(numbers, both, strict=True)}
        return found

    def _shares(self, found: Mapping[int, tuple[list[list[float]], list[list[float]]]], row: int) -> dict[str, float]:
        totals: dict[str, float] = {}
        for number, (_, weights) in found.items():
            for name, weight in zip(self._held[number], weights[row], strict=True):
                if weight > 0:
                    totals[name] = totals.get(name, 0.0) + weight
        return {name: total / len(self._held) for name, total in totals.items()}

    def _layers(
        self, found: Mapping[int, tuple[list[list[float]], list[list[float]]]], row: int
    ) -> tuple[Mapping[str, tuple[float, float]], ...]:
        if not self._in_full:
            return ()
        told: list[Mapping[str, tuple[float, float]]] = []
        for number, experts in enumerate(self._held):
            if number not in found:
                told.append({})
                continue
            scores, weights = (values[row] for values in found[number])
            rows = zip(experts, weights, scores, strict=True)
            told.append({name: (weight, score) for name, weight, score in rows if weight > 0})
        return tuple(told)


@torch.no_grad()
def _explain(layer: RoutedLinear, x: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scores and weights of some tokens, (tokens, experts), float32."""
    kept = layer.among_B1E, layer.prior_B1E
    layer.among_B1E, layer.prior_B1E = (_rows(given, rows) for given in kept)
    try:
        decision = layer.decide(x.flatten(0, -2)[list(rows)][None])
    finally:
        layer.among_B1E, layer.prior_B1E = kept
    held = None if layer.held is None else _rows(layer.held.all_weights_B1E, rows)
    weights = decision.weights_TE if held is None else held.expand_as(decision.scores_TE)
    return decision.scores_TE[0].float(), weights[0].float()


def _rows(given_1TN: Tensor | None, rows: Sequence[int]) -> Tensor | None:
    return given_1TN if given_1TN is None or given_1TN.shape[1] == 1 else given_1TN[:, list(rows)]


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
