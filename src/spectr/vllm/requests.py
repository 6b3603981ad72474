"""A request's routing options: which experts and router, and whether to report what was chosen.

Everything here may come from a client through ``vllm_xargs``. Options that cannot be read get the base
model alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

EXPERTS = "spectr_experts"  # names, as a list or with commas
ROUTING = "spectr_routing"  # "tokens" or "layers"
ROUTER = "spectr_router"  # the name of one of the routers in the model's config; the first is the default
VERDICT = "spectr_verdict"  # a prompt's verdict: by an expert's name its weight or its prior; in place of names
ROUTE_ID = "spectr_route_id"  # what reports of this request are marked with
PROBE = "spectr_probe"  # the prompt is read for a decision among the experts, which has this id
SKIPPED = "spectr_skipped"  # how many tokens at its beginning do not count
_LONGEST = 200


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The routing options of one request.

    Attributes:
        experts: The experts that it may use, sorted; ``None`` where it names none.
        understood: Whether the names could be read at all.
        routing: ``"tokens"``, ``"layers"``, or ``""`` for no report.
        route_id: What its reports are marked with.
        router: The name of its router; empty for the default, and for a single expert, where none chooses.
        verdict: The prompt's verdict, a number for each of the experts, if there is one.
        probe: Of a request whose prompt is read for a decision, by the base model alone: the decision's id.
        among: The experts that the decision is among.
        skipped: Tokens at the prompt's beginning that do not count.
    """

    experts: tuple[str, ...] | None = None
    understood: bool = True
    routing: str = ""
    route_id: str = ""
    router: str = ""
    verdict: tuple[float, ...] | None = None
    probe: str = ""
    among: tuple[str, ...] = ()
    skipped: int = 0

    @staticmethod
    def of(extra_args: Any) -> RequestOptions:
        """The options in ``SamplingParams.extra_args``; never raises."""
        if not isinstance(extra_args, Mapping):
            return RequestOptions()
        names, understood = _names(extra_args.get(EXPERTS))
        router, verdict = extra_args.get(ROUTER, ""), extra_args.get(VERDICT)
        probe, skipped = extra_args.get(PROBE), extra_args.get(SKIPPED, 0)
        if probe is not None:
            valid = isinstance(router, str) and isinstance(probe, str) and len(probe) <= _LONGEST
            if not (valid and isinstance(skipped, int) and skipped >= 0):
                return RequestOptions(experts=(), understood=False)
            return RequestOptions(experts=(), router=router, probe=probe, among=names or (), skipped=skipped)
        if not isinstance(router, str) or not (verdict is None or _is_verdict(verdict)):
            return RequestOptions(experts=(), understood=False)
        if verdict is not None:
            names = tuple(sorted(verdict))
            verdict = tuple(float(verdict[name]) for name in names)
        elif names is not None and len(names) < 2:
            router = ""  # there is nothing to choose
        routing, route_id = extra_args.get(ROUTING), extra_args.get(ROUTE_ID)
        if not (routing in ("tokens", "layers") and isinstance(route_id, str) and len(route_id) <= _LONGEST):
            routing, route_id = "", ""
        return RequestOptions(
            experts=names, understood=understood, routing=routing, route_id=route_id, router=router, verdict=verdict
        )

    @property
    def for_routing(self) -> RequestOptions:
        """The options that decide which experts it may use."""
        router = "" if self.probe else self.router
        return RequestOptions(experts=self.experts, understood=self.understood, router=router, verdict=self.verdict)

    def salt(self, removed: Collection[str] = ()) -> str:
        """Keeps the cached prefixes of one set, router or verdict apart from those of another; empty for no options.

        Args:
            removed: Experts that have left the engine; no prefix that they helped to compute is used again.
        """
        if self.for_routing == RequestOptions() and not removed:
            return ""
        left = None if self.experts is None else [name for name in self.experts if name not in removed]
        numbers = None if self.verdict is None else [self.number(name) for name in left or ()]
        router = self.for_routing.router if numbers is not None or left is None or len(left) > 1 else ""
        text = json.dumps([left, numbers, router, self.understood, sorted(removed) if left is None else []])
        return "spectr:" + hashlib.sha256(text.encode()).hexdigest()[:32]

    def number(self, name: str) -> float:
        """The verdict on one of its experts; 1 without a verdict."""
        return 1.0 if self.experts is None or self.verdict is None else self.verdict[self.experts.index(name)]

    def allowed(self, known: Collection[str], access: str) -> frozenset[str]:
        """The experts that the request may use: nothing at all where a name is unknown or could not be read.

        Args:
            known: All experts that were loaded, also those that have been removed since.
            access: ``"open"`` or ``"closed"``.
        """
        if not self.understood:
            return frozenset()
        if self.experts is None:
            return frozenset(known if access == "open" else ())
        return frozenset(self.experts) if set(self.experts) <= set(known) else frozenset()


def _names(given: Any) -> tuple[tuple[str, ...] | None, bool]:
    if given is None:
        return None, True
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return (), False
    return tuple(sorted({name.strip() for name in names} - {""})), True


def _is_verdict(given: Any) -> bool:
    """Whether it has numbers of at least zero by name."""
    return isinstance(given, Mapping) and all(
        isinstance(name, str) and isinstance(number, (int, float)) and number >= 0 for name, number in given.items()
    )
