"""The routers of one engine: which ones it can run, which chooses for a request, and what graphs depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

from spectr.combine import merge_factors, merge_outputs
from spectr.composed_model.quantization_config import Settings
from spectr.errors import CompositionError
from spectr.library import ExpertLibrary
from spectr.library.needs import CALIBRATED, OneExpert
from spectr.ops import report_once
from spectr.routers import LengthRouter, ModuleEvidence, PromptPolicy, Router, ShortlistRouter, token_router
from spectr.routers.abstention import policy_for, why_off


class Routers(NamedTuple):
    """The routers of one engine.

    Attributes:
        by_name: All of them by name, the default first.
        token_routers: Those that choose for each token; layers hold the factors of the first.
        numbers: By a router's name the number of the token router that chooses for it.
    """

    by_name: dict[str, Router]
    token_routers: tuple[Router, ...]
    numbers: dict[str, int]

    @property
    def layers(self) -> Router:
        """The router whose factors the layers hold."""
        return self.token_routers[0]

    @property
    def prompts(self) -> dict[str, PromptPolicy]:
        """The policies of the routers that read a prompt first."""
        return {name: one.policy for name, one in self.by_name.items() if one.policy is not None}

    def prompts_in(self, library: ExpertLibrary) -> dict[str, PromptPolicy]:
        """The policies with a library's thresholds of abstention. If none can abstain, this is logged once."""
        policies = {name: policy_for(self.by_name[name], library) for name in self.prompts}
        for remark in {why_off(self.by_name[name], library) for name in policies} - {None}:
            report_once(str(remark))
        return {name: policy for name, policy in policies.items() if policy is not None}

    @property
    def share_factors(self) -> bool:
        """Whether prompts are scored by the factors that the layers hold."""
        return CALIBRATED in self.layers.needs

    @property
    def most_fixed(self) -> int:
        """Most experts with fixed weights in a verdict; 0 if it is one expert, which always has all the weight."""
        most = max(map(_most_fixed_by, self.by_name.values()))
        return most if most > 1 else 0

    def number_of(self, name: str) -> int:
        """The number of the token router that chooses for this router's requests."""
        return self.numbers.get(name, 0)

    def permitted(self, name: str, verdict: Mapping[str, float], decided: bool) -> Mapping[str, float]:
        """How a request may use its experts; see :attr:`spectr.vllm.worker_state.WorkerState.routing_TE`.

        Args:
            name: Its router's name. With an unknown one, the base model answers alone.
            verdict: A number for each of its experts; ones if nothing was decided.
            decided: Whether anything was decided.
        """
        router = self.by_name.get(name or next(iter(self.by_name)))
        use = None if router is None or router.policy is None else router.policy.use
        if not decided:
            return verdict if len(verdict) < 2 or (router is not None and use is None) else {}
        if router is None or use is None:
            return {}
        if not use.fixes:
            return verdict
        fixed = {name: -number for name, number in verdict.items() if number > 0}
        return fixed if len(fixed) <= _most_fixed_by(router) else {}


def _most_fixed_by(router: Router) -> int:
    return (router.selection.k or 0) if _fixes(router) else 0


def _fixes(router: Router) -> bool:
    return router.policy is not None and router.policy.use.fixes


def routers_of(settings: Settings) -> Routers:
    """The routers of a model's config.

    Raises:
        CompositionError: One of them cannot run inside vLLM, or cannot run together with the others.
    """
    by_name = {name: supported(router) for name, router in settings.make_routers().items()}
    first = next(iter(by_name.values()))
    for router in by_name.values():
        if router.combination != first.combination:
            raise CompositionError(
                f"one engine cannot use both combine={first.combine!r} and combine={router.combine!r}",
                expected="a single combination, since the layers hold an expert's factors once",
                do="omit --combine, or one of the routers",
            )
    if len({probe_tokens(one.policy) for one in by_name.values() if one.policy is not None}) > 1:
        raise CompositionError(
            "the routers' probe_tokens differ", expected="equal numbers, since each prompt is read once"
        )
    choosing = {name: router for name, router in by_name.items() if not _fixes(router)} or by_name
    token_routers, numbers = list[Router](), dict[str, int]()
    for name, router in choosing.items():
        same = [number for number, other in enumerate(token_routers) if _chooses_as(router, other)]
        if not same:
            token_routers.append(router)
        elif router.policy is not None:
            token_routers[same[0]] = router  # which informs scores; the prior is 1 if there is none
        numbers[name] = same[0] if same else len(token_routers) - 1
    calibrated = [number for number, other in enumerate(token_routers) if CALIBRATED in other.needs]
    numbers |= dict.fromkeys(by_name.keys() - choosing.keys(), calibrated[0] if calibrated else 0)  # for their scores
    others = [router for router in token_routers if not isinstance(router, LengthRouter)]
    if len(token_routers) > 1 and others:
        raise CompositionError(
            f"{others[0]!r} cannot share an engine with another router that chooses for each token",
            expected="routers that score by the same factors: spectr, seqr, calibrated, arrow, uniform",
            do="use fewer routers, or --engine transformers",
        )
    return Routers(by_name, tuple(token_routers), numbers)


def _chooses_as(one: Router, other: Router) -> bool:
    """Whether two routers score tokens in the same way, by calibrated factors, and choose equally many experts."""
    return CALIBRATED in one.needs and CALIBRATED in other.needs and one.selection == other.selection


def probe_tokens(policy: PromptPolicy) -> int:
    """Maximum number of a prompt's tokens to read for a decision."""
    assert isinstance(policy.evidence, ModuleEvidence)
    return policy.evidence.probe_tokens


def decides_on_prompts(router: Router) -> bool:
    """Whether a router reads the prompt through its own scores to set weights or to inform scores."""
    policy = router.policy
    if policy is None or policy.evidence.reads != "scores":
        return False
    return policy.use.fixes or (policy.use.in_kernels and not policy.use.gathers)  # weights, or a product


def supported(router: Router) -> Router:
    """The router, if layers in vLLM can choose as it does.

    Raises:
        CompositionError: They cannot, or its combination does not work in a tensor-parallel layer.
    """
    instead = "one that decides for each token (spectr, calibrated-token, arrow, ...), calibrated or calibrated-prior"
    by_prompt = router.policy is not None and not decides_on_prompts(router)
    one = any(isinstance(need, OneExpert) for need in router.needs)
    if by_prompt or one or isinstance(token_router(router), ShortlistRouter):
        raise CompositionError(
            f"this router cannot run inside vLLM: {router!r}",
            expected=instead,
            do="use calibrated-token for a calibrated library, or spectr",
        )
    merge = router.combination.merge
    if merge not in (merge_outputs, merge_factors):
        raise CompositionError(
            f"combine={router.combine!r} cannot run inside vLLM",
            expected="'outputs', 'factors' or 'dare:density=SHARE'",
        )
    return router


def fingerprint(library: ExpertLibrary, compiled: bool) -> str:
    """A hash of what a graph depends on: the experts, their modules and ranks, and whether C code adds them."""
    experts = [library[name] for name in library]
    shapes = {e.name: {module: shape[:3] for module, shape in e.shapes.items()} for e in experts}
    return hashlib.sha256(json.dumps([shapes, compiled], sort_keys=True).encode()).hexdigest()[:16]
