"""Asking a live server with the official client, and comparing what it says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from serving import ALL
from spectr.serving.engines.generation import Batching

SETS = [("ants", "bees", "cats"), ("cats",), ("ants", "bees"), ("bees", "cats")]
PROMPTS = ["what is it", "a good film of the sky is the x y z", "no", "who is red", "the film is bad"]
MODES = {"one": lambda: None, "batched": lambda: Batching(cache_tokens=256, batch_tokens=16, requests=8, page=8)}


def ask(client, prompt, **given):
    extra = {key: given.pop(key) for key in ("experts", "router", "return_routing") if key in given}
    options = {"model": "spectr", "max_tokens": 6, "temperature": 0, **given}
    return client.chat.completions.create(
        messages=[{"role": "user", "content": prompt}], extra_body=extra or None, **options
    )


def open_to(address):
    """A client of a server without a policy."""
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def answers(address, requests, at_once):
    """Texts and routing of (prompt, options), asked at once or one after the other."""
    with OpenAI(base_url=f"{address}/v1", api_key=ALL, max_retries=0) as client:

        def one(request):
            prompt, given = request
            choice = ask(client, prompt, return_routing="layers", **given).choices[0]
            return choice.message.content, choice.routing

        if not at_once:
            return [one(request) for request in requests]
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(one, requests))


def watch_for_mixed_calls(engine):
    """A list that grows with each call of the model for tokens of several sets."""
    mixed, parts = [], engine.scheduler.parts

    def watched():
        found = parts()
        sets = {part.running.ticket.experts for part in found if part.running is not None}
        if len(sets) > 1:
            mixed.append(sets)
        return found

    if engine.batching is not None:
        engine.scheduler.parts = watched
    return mixed


def alike(ours, theirs):
    """The same text and, up to rounding, the same experts with the same weights and scores at every layer."""
    assert ours[0] == theirs[0]
    mine, other = ours[1], theirs[1]
    assert len(mine["tokens"]) == len(other["tokens"])
    assert mine["experts"] == other["experts"]
    numbers = [value for token in mine["by_layer"] for layer in token for row in layer for value in row]
    expected = [value for token in other["by_layer"] for layer in token for row in layer for value in row]
    assert numbers == pytest.approx(expected, rel=2e-3, abs=2e-3)
    assert numbers
