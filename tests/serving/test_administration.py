"""What an administrator sees and does, at the gateway alone."""

import asyncio

import httpx
import pytest

from inner import chat, error_of
from serving import ADMIN, ALL, CATS, POLICY
from spectr.serving.catalog import AccessPolicy
from spectr.serving.gateway import Gateway


def test_metrics_count_tokens_by_expert_and_are_for_administrators(ask, engine):
    gateway_text = ""
    chat(ask, experts=["cats"])
    gateway_text = ask.gateway.metrics.text().decode()
    assert 'spectr_tokens_total{expert="cats"} 0.6666' in gateway_text
    assert "spectr_generated_tokens_total 1.0" in gateway_text
    for name in ("outlier_score", "suspicion"):  # the second is the old name
        assert f'spectr_expert_{name}{{expert="bees"}} 9.31' in gateway_text
    assert "stand_in_up 1" in ask("GET", "/metrics", ADMIN, POLICY).text
    error_of(ask("GET", "/metrics", ALL, POLICY), 403, "admin_required")


def test_an_outlier_is_reported_in_the_list(ask):
    told = {model["id"]: model.get("outlier_score") for model in ask("GET", "/v1/models").json()["data"]}
    assert told == {"spectr": None, "spectr/ants": None, "spectr/bees": 9.3, "spectr/cats": None, "tiny": None}


def test_administrators_remove_experts_and_nobody_else_does(ask, engine):
    error_of(ask("DELETE", "/v1/experts/cats", ALL, POLICY), 403, "admin_required")
    error_of(ask("DELETE", "/v1/experts/cats", None, POLICY), 401, "invalid_api_key")
    told = error_of(ask("DELETE", "/v1/experts/cat", ADMIN, POLICY), 404, "expert_not_found")
    do = "use 'cats' if you mean that; /v1/experts lists the loaded experts"
    assert told == f"there is no expert 'cat'\n  to do: {do}"
    for path in ("/v1/experts", "/v1/experts/"):
        told = error_of(ask("DELETE", path, ADMIN, POLICY), 400, "invalid_request")
        assert told.splitlines()[:2] == ["the request names no expert", "  expected: DELETE /v1/experts/NAME"]
    assert ask("DELETE", "/v1/experts/cats", ADMIN, POLICY).json() == {
        "id": "cats",
        "object": "expert",
        "deleted": True,
    }
    error_of(chat(ask, CATS, POLICY), 404, "model_not_found", "model")
    error_of(chat(ask, ALL, POLICY, experts=["cats"]), 404, "expert_not_found", "experts")


def test_an_administrator_sees_what_can_be_removed_without_any_expert_of_its_own(ask):
    policy = AccessPolicy.model_validate({"keys": [{"name": "operations", "key": ADMIN, "admin": True}]})
    assert ask("GET", "/v1/models", ADMIN, policy).json()["data"] == []
    ants, bees, cats = ask("GET", "/v1/experts", ADMIN, policy).json()["data"]
    assert ants == ask("GET", "/v1/experts/ants", ADMIN, policy).json() == {"id": "ants", "object": "expert"}
    assert (bees, cats["id"]) == ({"id": "bees", "object": "expert", "outlier_score": 9.3, "suspicion": 9.3}, "cats")
    error_of(ask("GET", "/v1/experts/dogs", ADMIN, policy), 404, "expert_not_found")
    for path in ("/v1/experts", "/v1/experts/ants"):
        error_of(ask("GET", path, ALL, POLICY), 403, "admin_required")
        error_of(ask("GET", path, None, POLICY), 401, "invalid_api_key")


@pytest.mark.parametrize(("policy", "told"), [(POLICY, " with the key 'admin'"), (None, "")])
def test_a_removal_is_printed_by_the_server(inner, engine, policy, told):
    said = []
    gateway = Gateway(inner, engine, policy=policy, say=said.append)

    async def go(*names):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://here") as client:
            for name in names:
                await client.delete(f"/v1/experts/{name}", headers={"authorization": f"Bearer {ADMIN}"})

    asyncio.run(go("cats", "nobody", "cats"))
    assert said == [f"expert 'cats' was removed{told}"]
