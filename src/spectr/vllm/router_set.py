"""Which routers an engine with many requests in a batch can run, and what its graphs depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

from spectr.combine import merge_factors, merge_outputs
from spectr.composed_model.settings import Settings
from spectr.errors import CompositionError
from spectr.library import ExpertLibrary
from spectr.library.needs import CALIBRATED, OneExpert
from spectr.routers import LengthRouter, ModuleEvidence, PromptPolicy, Router, ShortlistRouter, token_router


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
    def prompts(self) -> dict[str, PromptPolicy]:
        """The policies of those that read a prompt first."""
        return {name: one.policy for name, one in self.named.items() if one.policy is not None}

    @property
    def alike(self) -> bool:
        """Whether prompts are scored by the factors that the layers hold."""
        return CALIBRATED in self.layers.needs

    @property
    def held(self) -> int:
        """How many experts a verdict gives weights at most; 0 where it names one alone, which gets all of it anyhow."""
        most = max(map(_held_by, self.named.values()))
        return most if most > 1 else 0

    def turn(self, name: str) -> int:
        """Which way the tokens of a router have."""
        return self.turns.get(name, 0)

    def granted(self, name: str, numbers: Mapping[str, float], decided: bool) -> Mapping[str, float]:
        """What a request may do with its experts; see :attr:`spectr.vllm.worker_state.Session.granted_TE`.

        Args:
            name: Its router's; of one that is not known it gets the base model alone.
            numbers: What was found of its experts; ones where nothing was.
            decided: Whether anything was.
        """
        router = self.named.get(name or next(iter(self.named)))
        use = None if router is None or router.policy is None else router.policy.use
        if not decided:
            return numbers if len(numbers) < 2 or (router is not None and use is None) else {}
        if router is None or use is None:
            return {}
        if not use.fixes:
            return numbers
        held = {name: -number for name, number in numbers.items() if number > 0}
        return held if len(held) <= _held_by(router) else {}


def _held_by(router: Router) -> int:
    return (router.selection.k or 0) if _fixes(router) else 0


def _fixes(router: Router) -> bool:
    return router.policy is not None and router.policy.use.fixes


def routers_of(settings: Settings) -> Routers:
    """Who routes by a model's config.

    Raises:
        CompositionError: One of them cannot run inside vLLM, or not beside the others.
    """
    named = {name: served(router) for name, router in settings.make_routers().items()}
    first = next(iter(named.values()))
    for router in named.values():
        if router.combination != first.combination:
            raise CompositionError(
                f"combine={first.combine!r}, and beside it {router.combine!r}",
                expected="one combination, as the layers hold an expert's factors once",
                do="leave --combine out, or one of the routers",
            )
    if len({probe_tokens(one.policy) for one in named.values() if one.policy is not None}) > 1:
        raise CompositionError("routers with other probe_tokens", expected="one number, as a prompt is read alike")
    choosing = {name: router for name, router in named.items() if not _fixes(router)} or named
    ways, turns = list[Router](), dict[str, int]()
    for name, router in choosing.items():
        same = [number for number, way in enumerate(ways) if _chooses_as(router, way)]
        if not same:
            ways.append(router)
        elif router.policy is not None:
            ways[same[0]] = router  # which informs, by ones where there is no prior
        turns[name] = same[0] if same else len(ways) - 1
    calibrated = [number for number, way in enumerate(ways) if CALIBRATED in way.needs]
    turns |= dict.fromkeys(named.keys() - choosing.keys(), calibrated[0] if calibrated else 0)  # for their scores
    others = [router for router in ways if not isinstance(router, LengthRouter)]
    if len(ways) > 1 and others:
        raise CompositionError(
            f"{others[0]!r} beside another router that chooses for each token",
            expected="routers that score by the same factors: spectr, seqr, calibrated, arrow, uniform",
            do="name fewer, or --engine transformers",
        )
    return Routers(named, tuple(ways), turns)


def _chooses_as(one: Router, other: Router) -> bool:
    """Whether two routers score tokens alike, by calibrated factors, and take as many."""
    return CALIBRATED in one.needs and CALIBRATED in other.needs and one.selection == other.selection


def probe_tokens(policy: PromptPolicy) -> int:
    """Tokens of a prompt that are read for a decision at most."""
    assert isinstance(policy.evidence, ModuleEvidence)
    return policy.evidence.probe_tokens


def decides_on_prompts(router: Router) -> bool:
    """Whether a router reads a prompt through its own scores, and holds weights or informs scores by what it finds."""
    policy = router.policy
    if policy is None or policy.evidence.reads != "scores":
        return False
    return policy.use.fixes or (policy.use.in_kernels and not policy.use.gathers)  # weights, or a product


def served(router: Router) -> Router:
    """The router itself, if layers in vLLM can choose as it does.

    Raises:
        CompositionError: They cannot, or its combination needs what a tensor-parallel layer does not have.
    """
    instead = "one that decides for each token (spectr, calibrated-token, arrow, ...), calibrated or calibrated-prior"
    by_prompt = router.policy is not None and not decides_on_prompts(router)
    one = any(isinstance(need, OneExpert) for need in router.needs)
    if by_prompt or one or isinstance(token_router(router), ShortlistRouter):
        raise CompositionError(
            f"this router cannot run inside vLLM: {router!r}",
            expected=instead,
            do="choose calibrated-token for a calibrated library, or spectr for any",
        )
    merge = router.combination.merge
    if merge not in (merge_outputs, merge_factors):
        raise CompositionError(
            f"combine={router.combine!r} cannot run inside vLLM",
            expected="'outputs', 'factors' or 'dare:density=SHARE'",
        )
    return router


def fingerprint(library: ExpertLibrary, compiled: bool) -> str:
    """What a graph depends on, 16 hex digits: which experts there are, where, their ranks, and what adds them."""
    experts = [library[name] for name in library]
    shapes = {e.name: {module: shape[:3] for module, shape in e.shapes.items()} for e in experts}
    return hashlib.sha256(json.dumps([shapes, compiled], sort_keys=True).encode()).hexdigest()[:16]
