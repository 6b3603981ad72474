"""Which routers an engine with many requests in a batch can run, and what its graphs depend on."""

from __future__ import annotations

import hashlib
import json
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


class Routers(NamedTuple):
    """Who routes in one engine.

    Attributes:
        layers: The layers hold its factors, and choose for each token as it does.
        prompts: Decides on whole prompts, for requests that ask for it, or for all where no other does. What it weighs
            the layers give whatever they would choose; its prior informs the scores that ``layers`` chooses by.
        by_token: Whether requests may be routed token by token.
    """

    layers: Router
    prompts: ProbingRouter | None
    by_token: bool

    @property
    def alike(self) -> bool:
        """Whether prompts are scored by the factors that the layers hold."""
        return self.layers is self.prompts or all(isinstance(one, Calibrated) for one in (self.layers, self.prompts))

    @property
    def held(self) -> int:
        """How many experts a verdict gives weights at most; 0 where it names one alone, which gets all of it anyhow."""
        top_k = getattr(self.prompts, "top_k", 0)
        return top_k if level_of(self.prompts) == "prompt" and top_k > 1 else 0

    def take(self, level: str, decided: bool, experts: int) -> bool:
        """Whether a request may have so many experts, decided on or not."""
        if not decided:
            return experts < 2 or (level == "token" and self.by_token)
        return experts <= self.held if level == "prompt" else level_of(self.prompts) == "prior"


def routers_of(settings: Settings) -> Routers:
    """Who routes by a model's config.

    Raises:
        CompositionError: One of them cannot run inside vLLM, or not beside the other.
    """
    router, beside = served(settings.make_router()), settings.make_prompts()
    if beside is None:
        found = router if decides_on_prompts(router) else None
        return Routers(router, found, found is None)
    if not decides_on_prompts(beside) or decides_on_prompts(router):
        raise CompositionError(
            f"{router!r}, and beside it for whole prompts {beside!r}",
            expected="a router that decides for each token, and beside it calibrated or calibrated-prior",
            do="leave one of them out",
        )
    if combination(router) != combination(served(beside)):
        raise CompositionError(
            f"combine={combination_of(router)!r}, and beside it for whole prompts {combination_of(beside)!r}",
            expected="one combination, as the layers hold an expert's factors once",
            do="leave --combine out, or one of the routers",
        )
    if beside.level == "prompt":
        return Routers(router, beside, True)
    if not isinstance(router, Calibrated) or selection_of(router) != selection_of(beside):
        raise CompositionError(
            f"{router!r}, and beside it {beside!r}, whose prior informs the scores that the layers choose by",
            expected="calibrated-token, which chooses as many experts by the same scores",
            do="leave one of them out",
        )
    return Routers(beside, beside, True)


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
            f"combine={combination_of(router)!r} cannot run inside vLLM", expected="'outputs', 'factors' or 'dare:RATE'"
        )
    return router


def fingerprint(library: ExpertLibrary, compiled: bool) -> str:
    """What a graph depends on, 16 hex digits: which experts there are, where, their ranks, and what adds them."""
    experts = [library[name] for name in library]
    shapes = {e.name: {module: shape[:3] for module, shape in e.shapes.items()} for e in experts}
    return hashlib.sha256(json.dumps([shapes, compiled], sort_keys=True).encode()).hexdigest()[:16]
