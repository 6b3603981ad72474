"""Which routers an engine with many requests in a batch can run, and what its graphs depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from spectr.combine import get_combination, merge_factors, merge_outputs
from spectr.composed.settings import Settings
from spectr.errors import CompositionError
from spectr.library import ExpertLibrary
from spectr.routers import (
    Calibrated,
    GuidedRouter,
    Oracle,
    ProbingRouter,
    PromptRouter,
    Router,
    Shortlist,
    ShortlistRouter,
)
from spectr.routers.settings import combination_of, selection_of
from spectr.vllm.ways import KIN


class Routers(NamedTuple):
    """Who routes in one engine.

    Attributes:
        named: All of them by name, the default first.
        ways: Those that layers choose as; they hold the factors of the first.
        turns: By a router's name which of these chooses for its tokens.
    """

    named: dict[str, Router]
    ways: tuple[Router, ...]
    turns: dict[str, int]

    @property
    def layers(self) -> Router:
        """Whose factors the layers hold."""
        return self.ways[0]

    @property
    def prompts(self) -> dict[str, ProbingRouter]:
        """Those that read a prompt first."""
        return {name: router for name, router in self.named.items() if decides_on_prompts(router)}

    @property
    def alike(self) -> bool:
        """Whether prompts are scored by the factors that the layers hold."""
        return isinstance(self.layers, Calibrated)

    @property
    def held(self) -> int:
        """How many experts a verdict gives weights at most; 0 where it names one alone, which gets all of it anyhow."""
        most = max(map(_held_by, self.named.values()))
        return most if most > 1 else 0

    def turn(self, name: str) -> int:
        """Which way the tokens of a router have."""
        return self.turns.get(name, 0)

    def granted(self, name: str, numbers: Mapping[str, float], decided: bool) -> Mapping[str, float]:
        """What a request may do with its experts; see :attr:`spectr.vllm.session.Session.granted_TE`.

        Args:
            name: Its router's; of one that is not known it gets the base model alone.
            numbers: What was found of its experts; ones where nothing was.
            decided: Whether anything was.
        """
        router = self.named.get(name or next(iter(self.named)))
        level = level_of(router)
        if not decided:
            return numbers if len(numbers) < 2 or (router is not None and level == "token") else {}
        if level == "prompt":
            held = {name: -number for name, number in numbers.items() if number > 0}
            return held if len(held) <= _held_by(router) else {}
        return numbers if level == "prior" else {}


def _held_by(router: Router | None) -> int:
    return getattr(router, "top_k", 0) if level_of(router) == "prompt" else 0


def routers_of(settings: Settings) -> Routers:
    """Who routes by a model's config.

    Raises:
        CompositionError: One of them cannot run inside vLLM, or not beside the others.
    """
    named = {name: served(router) for name, router in settings.make_routers().items()}
    first = next(iter(named.values()))
    for router in named.values():
        if combination(router) != combination(first):
            raise CompositionError(
                f"combine={combination_of(first)!r}, and beside it {combination_of(router)!r}",
                expected="one combination, as the layers hold an expert's factors once",
                do="leave --combine out, or one of the routers",
            )
    if len({router.probe_tokens for router in named.values() if decides_on_prompts(router)}) > 1:
        raise CompositionError("routers with other probe_tokens", expected="one number, as a prompt is read alike")
    choosing = {name: router for name, router in named.items() if level_of(router) != "prompt"} or named
    ways, turns = list[Router](), dict[str, int]()
    for name, router in choosing.items():
        same = [number for number, way in enumerate(ways) if _chooses_as(router, way)]
        if not same:
            ways.append(router)
        elif level_of(router) == "prior":
            ways[same[0]] = router  # which informs, by ones where there is no prior
        turns[name] = same[0] if same else len(ways) - 1
    calibrated = [number for number, way in enumerate(ways) if isinstance(way, Calibrated)]
    turns |= dict.fromkeys(named.keys() - choosing.keys(), calibrated[0] if calibrated else 0)  # for their scores
    others = [router for router in ways if not isinstance(router, KIN)]
    if len(ways) > 1 and others:
        raise CompositionError(
            f"{others[0]!r} beside another router that chooses for each token",
            expected=f"routers that score by the same factors: {', '.join(kin.__name__.lower() for kin in KIN)}",
            do="name fewer, or --engine transformers",
        )
    return Routers(named, tuple(ways), turns)


def _chooses_as(one: Router, other: Router) -> bool:
    """Whether two routers score tokens alike, and take as many."""
    return isinstance(one, Calibrated) and isinstance(other, Calibrated) and selection_of(one) == selection_of(other)


def combination(router: Router) -> Any:
    """What a router makes of an expert's factors, and of those that are chosen."""
    return get_combination(combination_of(router))


def level_of(router: Router | None) -> str:
    """``"prompt"`` or ``"prior"`` of a router that reads prompts before it decides, else ``"token"``."""
    return router.level if isinstance(router, PromptRouter) else "token"


def decides_on_prompts(router: Router) -> TypeGuard[ProbingRouter]:
    """Whether a router reads a prompt through its own scores, and holds weights or informs scores by what it finds."""
    return isinstance(router, ProbingRouter) and level_of(router) in ("prompt", "prior")


def served(router: Router) -> Router:
    """The router itself, if layers in vLLM can choose as it does.

    Raises:
        CompositionError: They cannot, or its combination needs what a tensor-parallel layer does not have.
    """
    instead = "one that decides for each token (spectr, calibrated-token, arrow, ...), calibrated or calibrated-prior"
    by_prompt = level_of(router) != "token" and not decides_on_prompts(router)
    if isinstance(router, (Shortlist, ShortlistRouter, GuidedRouter, Oracle)) or by_prompt:
        raise CompositionError(
            f"this router cannot run inside vLLM: {router!r}",
            expected=instead,
            do="choose calibrated-token for a calibrated library, or spectr for any",
        )
    merge = get_combination(combination_of(router)).merge
    if merge not in (merge_outputs, merge_factors):
        raise CompositionError(
            f"combine={combination_of(router)!r} cannot run inside vLLM",
            expected="'outputs', 'factors' or 'dare:density=SHARE'",
        )
    return router


def fingerprint(library: ExpertLibrary, compiled: bool) -> str:
    """What a graph depends on, 16 hex digits: which experts there are, where, their ranks, and what adds them."""
    experts = [library[name] for name in library]
    shapes = {e.name: {module: shape[:3] for module, shape in e.shapes.items()} for e in experts}
    return hashlib.sha256(json.dumps([shapes, compiled], sort_keys=True).encode()).hexdigest()[:16]
