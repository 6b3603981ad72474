"""Served answers of the base model, where no expert stands out for a key that may use experts."""

from __future__ import annotations

import pytest
import torch
from openai import OpenAI

from abstaining import COMMON, FITTING, Foretold
from asking import MODES, ask
from models import greedy
from serving import ADMIN, CATS, POLICY, served
from spectr import PromptPolicy, Spectr
from spectr.models import encode_prompt
from spectr.routers import HoldWeights, MultiplyScores
from spectr.serving.api_fields import routing
from spectr.serving.engines.engine import Step, Ticket
from text_model import make_model, make_tokenizer

USES = {"held": HoldWeights(), "prior": MultiplyScores()}


def base_answer(prompt):
    tokenizer = make_tokenizer()
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    told = greedy(make_model(), ids, 6, min_new_tokens=0)[0, ids.shape[1] :]
    return tokenizer.decode(told, skip_special_tokens=True), len(told)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use", USES)
def test_the_base_model_answers_and_the_answer_reports_it(library, use, mode):
    router = PromptPolicy(evidence=Foretold(), use=USES[use], router=Spectr(top_k=2), abstain=0.1)
    with (
        served(library, router, policy=POLICY, batching=MODES[mode]()) as (address, _),
        OpenAI(base_url=f"{address}/v1", api_key=ADMIN, max_retries=0) as client,  # may not ask for the base by name
    ):
        for level in (True, "layers"):
            choice = ask(client, COMMON[0], return_routing=level).choices[0]
            text, tokens = base_answer(COMMON[0])
            assert choice.message.content == text
            assert choice.routing["experts"] == ["ants", "bees", "cats"]
            assert choice.routing["tokens"] == [[]] * tokens
            assert choice.routing["p"] == 0.4
            if level == "layers":
                assert not any(layer for token in choice.routing["by_layer"] for layer in token)
        choice = ask(client, FITTING[0], return_routing=True).choices[0]
        assert all(choice.routing["tokens"])
        assert choice.routing["p"] == 0.01
        chunks = [
            chunk.choices[0].routing
            for chunk in ask(client, COMMON[0], stream=True, return_routing=True)
            if chunk.choices[0].routing["tokens"]
        ]
        assert {chunk["p"] for chunk in chunks} == {0.4}
        one = ask(client, COMMON[0], return_routing=True, experts=["cats"]).choices[0]  # whoever names one expert
        assert all(one.routing["tokens"])
        assert "p" not in ask(client, COMMON[0]).choices[0].model_extra.get("routing", {})


def test_a_key_of_one_expert_gets_that_expert(library):
    router = PromptPolicy(evidence=Foretold(), use=HoldWeights(), router=Spectr(top_k=2), abstain=0.1)
    with (
        served(library, router, policy=POLICY) as (address, _),
        OpenAI(base_url=f"{address}/v1", api_key=CATS, max_retries=0) as client,
    ):
        assert all(ask(client, COMMON[0], return_routing=True).choices[0].routing["tokens"])


def test_the_field_is_there_where_it_is_known():
    ticket = Ticket(id="1", experts=("ants", "bees"), router="held", record="shares")
    assert routing(ticket, [Step({}, p=0.41239)], []) == {"experts": ["ants", "bees"], "tokens": [[]], "p": 0.412}
    assert "p" not in routing(ticket, [Step({"ants": 1.0})], [])
    assert "p" not in routing(ticket, [], [])
