"""Verdicts of the base model alone in vLLM: from a probe to a request that may use no expert, and its p-value."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from composed_parts import session_of, several
from spectr import Calibrated
from spectr.routers import Found, PromptPolicy
from spectr.routers.evidence import ModuleScores
from spectr.serving.engines.engine import Ticket
from spectr.serving.engines.vllm import VllmEngine
from spectr.vllm import EXPERTS
from spectr.vllm.probes import Probes, Verdict
from spectr.vllm.prompt_decisions import Decider
from spectr.vllm.requests import ROUTER, VERDICT, RequestOptions
from spectr.vllm.router_set import routers_of

NAMES = ("amber", "blue", "cyan")
SCORES = {"m": ModuleScores(torch.tensor([[1.0, 3.0, 2.0]]), torch.zeros(1, dtype=torch.long), 1)}


class Telling(PromptPolicy):
    """A policy whose evidence gives this p."""

    p = 0.4

    def verdict(self, found):
        return super().verdict(Found(found.evidence_BE, torch.full((len(found.evidence_BE),), self.p)))


def decided(router, names=NAMES):
    policy = router.policy
    telling = Telling(evidence=policy.evidence, use=policy.use, router=policy.router, abstain=0.1)
    return probes_of(telling)._decide(SCORES, "r", names)


def probes_of(policy):
    probes = Probes({"r": policy}, {"m": NAMES})
    made = torch.rand(4, 1, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    probes._null = [{"m": ModuleScores(scores_1E, torch.zeros(1, dtype=torch.long), 1)} for scores_1E in made]
    return probes


@pytest.mark.parametrize("router", [Calibrated(), Calibrated(level="prior"), Calibrated(top_k=2, weights="softmax")])
def test_a_probe_without_an_expert_that_stands_out_decides_for_none(router):
    assert decided(router).numbers == {}
    assert decided(router, ("blue",)).numbers == {"blue": 1.0}  # alone it is taken
    always = probes_of(router.policy)._decide(SCORES, "r", NAMES)
    assert always.numbers
    assert all(number > 0 for number in always.numbers.values())


@pytest.mark.parametrize("router", ["calibrated", "calibrated-prior"])
def test_a_request_whose_verdict_is_for_none_has_the_base_model_and_its_cache(tmp_path, router):
    session = session_of(tmp_path, NAMES)
    session.routers = routers_of(several("spectr", router))
    options = RequestOptions.of({ROUTER: router, EXPERTS: []})
    assert np.isnan(session.row(options)).all()
    assert options.salt() == RequestOptions.of({EXPERTS: []}).salt()  # the base model's cached prefixes
    others = [{ROUTER: router, EXPERTS: ["blue"]}, {ROUTER: router, VERDICT: {"blue": 1.0, "cyan": 0.5}}, {}]
    assert len({options.salt(), *(RequestOptions.of(other).salt() for other in others)}) == 4


class Client:
    """An engine that has decided already."""

    def __init__(self, verdicts):
        self.verdicts, self.asked, self.errored = verdicts, [], False

    async def generate(self, prompt, params, request_id, **_):
        self.asked.append((request_id, params.extra_args))
        yield request_id

    async def collective_rpc(self, method, args=()):
        return [self.verdicts.pop(0)]


class Params:
    def __init__(self, extra_args=None, **_):
        self.extra_args = extra_args

    def clone(self):
        return Params(dict(self.extra_args))


def test_the_p_value_of_a_request_is_kept_for_its_answer(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", SimpleNamespace(SamplingParams=Params))
    client = Client([Verdict({}, 0.4), Verdict({"blue": 1.0}, 0.02), Verdict({"blue": 1.0, "cyan": 0.5})])
    decider = Decider(client, SimpleNamespace(calibration=None), {"calibrated"}, 8)

    async def go(request_id):
        params = Params({ROUTER: "calibrated", EXPERTS: list(NAMES)})
        return [out async for out in client.generate({"prompt_token_ids": [1, 2, 3]}, params, request_id)]

    for request_id in ("chatcmpl-one", "cmpl-two-0", "cmpl-two-1"):
        assert asyncio.run(go(request_id)) == [request_id]
    asked = [extra for request_id, extra in client.asked if not request_id.startswith("probe")]
    assert [extra.get(EXPERTS) for extra in asked] == [[], ["blue"], None]
    assert asked[2][VERDICT] == {"blue": 1.0, "cyan": 0.5}
    assert decider.p == {"chatcmpl-one": 0.4, "cmpl-two-0": 0.02}
    status = {"layers": 1, "names": ["m"], "experts": list(NAMES)}
    engine = VllmEngine(client, status, SimpleNamespace(), base_model="b", routers={"r": "r"}, p=decider.p)
    one, two = (Ticket(id=name, experts=NAMES, router="r") for name in ("one", "two"))
    assert [engine._p_of(one, 0), engine._p_of(two, 0), engine._p_of(two, 1)] == [0.4, 0.02, None]
