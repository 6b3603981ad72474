"""Which routers an engine with many requests in a batch can run, and what its graphs depend on."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple, TypeGuard

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
from spectr.routers.settings import combination_of


class Routers(NamedTuple):
    """Who routes in one engine.

    Attributes:
        layers: The layers hold its factors, and choose for each token as it does.
        prompts: Decides on whole prompts, for requests that ask for it, or for all where it is the same. The layers
            give the one expert that it found, and no other router would give less: a token that may use one expert
            gets all of it.
    """

    layers: Router
    prompts: ProbingRouter | None

    @property
    def by_token(self) -> bool:
        """Whether requests may be routed token by token."""
        return self.layers is not self.prompts

    @property
    def alike(self) -> bool:
        """Whether prompts are scored by the factors that the layers hold."""
        return not self.by_token or (isinstance(self.layers, Calibrated) and isinstance(self.prompts, Calibrated))


def routers_of(settings: Settings) -> Routers:
    """Who routes by a model's config.

    Raises:
        CompositionError: One of them cannot run inside vLLM, or not beside the other.
    """
    router, beside = served(settings.make_router()), settings.make_prompts()
    if beside is None:
        return Routers(router, router if decides_on_prompts(router) else None)
    if not decides_on_prompts(beside) or decides_on_prompts(router):
        raise CompositionError(
            f"{router!r}, and beside it for whole prompts {beside!r}",
            expected="a router that decides for each token, and beside it calibrated with top_k=1",
            do="leave one of them out",
        )
    if dropped(router) != dropped(served(beside)):
        raise CompositionError(
            f"combine={combination_of(router)!r}, and beside it for whole prompts {combination_of(beside)!r}",
            expected="routers that drop the same of an expert, as the layers hold its factors once",
            do="leave --combine out, or one of the routers",
        )
    return Routers(router, beside)


def dropped(router: Router) -> float:
    """How much of an expert's factors a router's combination leaves out."""
    return get_combination(combination_of(router)).drop_rate


def decides_on_prompts(router: Router) -> TypeGuard[ProbingRouter]:
    """Whether a router reads a prompt through its own scores and holds one expert for all of it."""
    return isinstance(router, ProbingRouter) and router.level == "prompt" and getattr(router, "top_k", 0) == 1


def served(router: Router) -> Router:
    """The router itself, if it decides token by token, or holds one expert for a prompt.

    Raises:
        CompositionError: It does not, or its combination needs what a tensor-parallel layer does not have.
    """
    instead = "one that decides for each token (spectr, calibrated-token, arrow, ...), or calibrated with top_k=1"
    by_prompt = isinstance(router, PromptRouter) and router.level != "token" and not decides_on_prompts(router)
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
