"""What a request asks for beside its sampling: which experts, and whether to report what was chosen.

Everything here may come from a client through ``vllm_xargs``. Whatever cannot be understood is the base model alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

EXPERTS = "spectr_experts"  # names, as a list or with commas
ROUTING = "spectr_routing"  # "tokens" or "layers"
LEVEL = "spectr_level"  # "prompt": one expert for all of it, which somebody has to decide on; "token" is the default
ROUTE_ID = "spectr_route_id"  # what reports of this request are marked with
PROBE = "spectr_probe"  # the prompt is read for a decision among the experts, and is asked for by this name
UNHEARD = "spectr_unheard"  # how many tokens at its beginning have no say
_LONGEST = 200


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request's own settings.

    Attributes:
        experts: The experts that it may use, sorted; ``None`` where it names none.
        understood: Whether the names could be read at all.
        routing: ``"tokens"``, ``"layers"``, or ``""`` for no report.
        route_id: What its reports are marked with.
        undecided: Whether it waits for one of its experts to be held for all of it.
        probe: Where its prompt is read for a decision, by the base model alone: what the verdict is asked for by.
        among: The experts that are decided among.
        unheard: Tokens at the prompt's beginning that have no say.
    """

    experts: tuple[str, ...] | None = None
    understood: bool = True
    routing: str = ""
    route_id: str = ""
    undecided: bool = False
    probe: str = ""
    among: tuple[str, ...] = ()
    unheard: int = 0

    @staticmethod
    def of(extra_args: Any) -> Asked:
        """What ``SamplingParams.extra_args`` says; never raises."""
        if not isinstance(extra_args, Mapping):
            return Asked()
        names, understood = _names(extra_args.get(EXPERTS))
        probe, unheard = extra_args.get(PROBE), extra_args.get(UNHEARD, 0)
        if probe is not None:
            if not (isinstance(probe, str) and len(probe) <= _LONGEST and isinstance(unheard, int) and unheard >= 0):
                return Asked(experts=(), understood=False)
            return Asked(experts=(), probe=probe, among=names or (), unheard=unheard)
        level = extra_args.get(LEVEL, "token")
        if level not in ("token", "prompt"):
            return Asked(experts=(), understood=False)
        routing, route_id = extra_args.get(ROUTING), extra_args.get(ROUTE_ID)
        if not (routing in ("tokens", "layers") and isinstance(route_id, str) and len(route_id) <= _LONGEST):
            routing, route_id = "", ""
        one = names is not None and len(names) < 2
        undecided = level == "prompt" and not one
        return Asked(experts=names, understood=understood, routing=routing, route_id=route_id, undecided=undecided)

    @property
    def granted(self) -> Asked:
        """The same, less all that changes nothing of which experts it may use."""
        return Asked(experts=self.experts, understood=self.understood, undecided=self.undecided)

    def salt(self, removed: Collection[str] = ()) -> str:
        """What keeps the cached prefixes of one set of experts from those of another; empty for no set at all.

        Args:
            removed: Experts that have left the engine, so that nothing that they helped to compute is used again.
        """
        if self.granted == Asked() and not removed:
            return ""
        names = None if self.experts is None else sorted(set(self.experts) - set(removed))
        text = json.dumps([names, self.understood, self.undecided, sorted(removed) if names is None else []])
        return "spectr:" + hashlib.sha256(text.encode()).hexdigest()[:32]

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
