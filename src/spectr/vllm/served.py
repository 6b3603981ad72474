"""Which routers an engine with many requests in a batch can run, and what its graphs depend on."""

from __future__ import annotations

import hashlib
import json

from spectr.combine import get_combination, merge_factors, merge_outputs
from spectr.errors import CompositionError
from spectr.library import ExpertLibrary
from spectr.routers import GuidedRouter, Oracle, ProbingRouter, PromptRouter, Router, Shortlist, ShortlistRouter
from spectr.routers.settings import combination_of


def decides_on_prompts(router: Router) -> bool:
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
