"""Live servers on transformers' own code, asked by the official client: one request at a time, and in batches."""

import gc
import json
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from openai import OpenAI

import spectr
from asking import MODES, PROMPTS, SETS, alike, answers, ask, open_to, watch_for_mixed_calls
from serving import ADMIN, ALL, CATS, POLICY, served
from spectr import Calibrated
from spectr.serving.engines.generation import Batching

ROUTERS = [Calibrated(), Calibrated(level="prior"), spectr.Spectr(top_k=2)]


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


@pytest.fixture(scope="module", params=MODES)
def server(request, library):
    with served(library, policy=POLICY, batching=MODES[request.param]()) as (address, engine):
        yield address, engine


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server[0]}/v1", api_key=ALL, max_retries=0) as client:
        yield client


REQUESTS = list(zip([*PROMPTS, *PROMPTS], [*SETS, *SETS, *SETS], strict=False))


@pytest.fixture(
    scope="module", params=ROUTERS, ids=lambda router: f"{type(router).__name__}-{getattr(router, 'level', '')}"
)
def router_and_answers(request, library):
    """A router, and what servers answer that have the experts of a set and no other."""
    found = {}
    for names in SETS:
        with served(library, request.param, names=names) as (address, _):
            asked = [prompt for prompt, other in REQUESTS if other == names]
            for prompt, answer in zip(asked, answers(address, [(p, {}) for p in asked], False), strict=True):
                found[prompt, names] = answer
    return request.param, found


def test_a_set_is_answered_as_by_a_server_that_has_no_other_expert(library, router_and_answers, mode):
    router, expected = router_and_answers
    with served(library, router, batching=mode()) as (address, engine):
        mixed = watch_for_mixed_calls(engine)
        for at_once in (True, False):
            given = [(prompt, {"experts": list(names)}) for prompt, names in REQUESTS]
            for answer, request in zip(answers(address, given, at_once), REQUESTS, strict=True):
                alike(answer, expected[request])
        assert bool(mixed) is (engine.batching is not None)
    assert len({text for text, _ in expected.values()}) > 1


def test_the_base_model_answers_as_if_it_had_never_been_composed(client, server):
    import torch

    from models import greedy
    from spectr.models import encode_prompt
    from text_model import make_model, make_tokenizer

    model, tokenizer = make_model(), make_tokenizer()
    for prompt in PROMPTS:
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        told = greedy(model, ids, 6, min_new_tokens=0)[0, ids.shape[1] :]
        choice = ask(client, prompt, model="tiny", return_routing=True).choices[0]
        assert choice.message.content == tokenizer.decode(told, skip_special_tokens=True)
        assert choice.routing == {"experts": [], "tokens": [[] for _ in told]}


def test_streams_carry_the_text_and_the_routing_of_the_whole_answer(client):
    for given in ({}, {"experts": ["ants", "cats"]}, {"model": "spectr/bees"}):
        whole = ask(client, PROMPTS[1], return_routing=True, **given).choices[0]
        chunks = list(ask(client, PROMPTS[1], stream=True, return_routing=True, **given))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
        tokens = [token for chunk in chunks for token in chunk.choices[0].routing["tokens"]]
        assert tokens == whole.routing["tokens"]
        spoken = [chunk.choices[0] for chunk in chunks if chunk.choices[0].delta.content]
        assert all(len(choice.routing["tokens"]) == 1 for choice in spoken)  # a word is a token here
        assert chunks[-1].choices[0].finish_reason == whole.finish_reason
        assert all("usage" not in chunk.model_fields_set for chunk in chunks)


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_stream_tells_its_usage_in_a_chunk_of_its_own_to_who_asks(client, kind):
    given = {"model": "spectr", "max_tokens": 5, "temperature": 0, "extra_body": {"return_routing": True}}
    given |= {"prompt": "the sky is"} if kind == "text" else {"messages": [{"role": "user", "content": "the sky is"}]}
    create = (client.completions if kind == "text" else client.chat.completions).create
    whole = create(**given)
    *chunks, last = create(**given, stream=True, stream_options={"include_usage": True})
    assert (last.choices, last.usage) == ([], whole.usage)
    assert (last.id, last.model) == (chunks[0].id, "spectr")
    assert all(chunk.choices and "usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    tokens = [token for chunk in chunks for token in chunk.choices[0].routing["tokens"]]
    assert tokens == whole.choices[0].routing["tokens"]
    assert len(tokens) == last.usage.completion_tokens
    with pytest.raises(openai.BadRequestError, match="is for streams only") as caught:
        create(**given, stream_options={"include_usage": True})
    assert caught.value.param == "stream_options"


def test_completions_as_well(client):
    given = {"model": "spectr", "prompt": "the sky is", "max_tokens": 5, "temperature": 0}
    whole = client.completions.create(**given, extra_body={"return_routing": True, "experts": ["cats"]})
    assert whole.choices[0].routing["experts"] == ["cats"]
    assert whole.choices[0].routing["tokens"] == [[[0, 1.0]]] * whole.usage.completion_tokens
    chunks = list(client.completions.create(**given, stream=True, extra_body={"experts": ["cats"]}))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.model == chunks[0].model == "spectr"


def test_one_expert_alone_is_a_model_of_its_own(client):
    alone = ask(client, PROMPTS[1], model="spectr/cats")
    narrowed = ask(client, PROMPTS[1], experts=["cats"])
    assert alone.choices[0].message.content == narrowed.choices[0].message.content
    assert (alone.model, narrowed.model) == ("spectr/cats", "spectr")


def test_models_are_listed_as_the_client_expects(client):
    assert [model.id for model in client.models.list()] == [
        "spectr",
        "spectr/ants",
        "spectr/bees",
        "spectr/cats",
        "tiny",
    ]
    assert client.models.retrieve("spectr/ants").id == "spectr/ants"


@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_the_clients_own_errors(client, server, stream):
    with pytest.raises(openai.NotFoundError, match="there is no expert 'dogs'"):
        ask(client, "no", experts=["dogs"], stream=stream)
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, "no", model="spectr/dogs", stream=stream)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="router 'arrow' is not served"):
        ask(client, "no", router="arrow", stream=stream)
    with pytest.raises(openai.BadRequestError, match=r"the prompt has \d+ tokens") as caught:
        ask(client, "no " * 70, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="'n' has an unsupported value"):
        ask(client, "no", n=2, stream=stream)
    with pytest.raises(openai.BadRequestError, match="not supported by this engine"):
        client.chat.completions.create(
            model="spectr", messages=[{"role": "user", "content": "x"}], extra_body={"nonsense": 1}, stream=stream
        )
    with pytest.raises(openai.BadRequestError, match="use 'metadata' if you mean that") as caught:
        client.chat.completions.create(
            model="spectr", messages=[{"role": "user", "content": "x"}], extra_body={"metadat": {}}, stream=stream
        )
    assert caught.value.param == "metadat"
    with OpenAI(base_url=f"{server[0]}/v1", api_key="sk-of-nobody", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            ask(stranger, "no", stream=stream)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
    with OpenAI(base_url=f"{server[0]}/v1", api_key=CATS, max_retries=0) as other:
        with pytest.raises(openai.NotFoundError, match="there is no expert 'ants'"):
            ask(other, "no", experts=["ants"], stream=stream)
        assert ask(other, "no", return_routing=True).choices[0].routing["experts"] == ["cats"]
    assert ask(client, "no").choices[0].finish_reason


def test_an_empty_prompt_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(model="spectr", prompt="")


def test_answers_end_where_the_context_ends(client):
    answer = ask(client, "no " * 50, max_tokens=1000)
    assert answer.usage.total_tokens <= 64


def test_sampling_is_each_requests_own(client):
    hot = {ask(client, PROMPTS[1], temperature=2.0, max_tokens=12).choices[0].message.content for _ in range(8)}
    cold = {ask(client, PROMPTS[1], max_tokens=12).choices[0].message.content for _ in range(4)}
    assert len(hot) > 1
    assert len(cold) == 1


def test_a_seed_is_sampled_with_again(library):
    with served(library) as (address, _), open_to(address) as client:
        given = {"temperature": 2.0, "max_tokens": 20}
        texts = [ask(client, PROMPTS[1], seed=seed, **given).choices[0].message.content for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_clients_that_hang_up_leave_the_others_unharmed(server, client):
    address, engine = server
    expected = ask(client, PROMPTS[1], max_tokens=12).choices[0].message.content
    body = {"model": "spectr", "messages": [{"role": "user", "content": PROMPTS[1]}], "max_tokens": 40}

    def leave(stream):
        try:
            with httpx.stream(
                "POST",
                f"{address}/v1/chat/completions",
                json={**body, "stream": stream},
                headers={"authorization": f"Bearer {ALL}"},
                timeout=0.05 if not stream else 5,
            ) as answer:
                for _ in answer.iter_raw(1):
                    return
        except httpx.TimeoutException:
            return

    with ThreadPoolExecutor(12) as pool:
        leaving = [pool.submit(leave, bool(number % 2)) for number in range(8)]
        staying = [pool.submit(ask, client, PROMPTS[1], max_tokens=12) for _ in range(4)]
        assert {one.result().choices[0].message.content for one in staying} == {expected}
        for one in leaving:
            one.result()
    end = time.monotonic() + 10
    while engine._running and time.monotonic() < end:
        time.sleep(0.02)
    assert not engine._running
    assert ask(client, PROMPTS[1], max_tokens=12).choices[0].message.content == expected


def test_health_and_metrics(server, client):
    address, engine = server
    ask(client, PROMPTS[0], model="spectr/cats", max_tokens=3)
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    text = httpx.get(f"{address}/metrics", headers={"authorization": f"Bearer {ADMIN}"}).text
    assert f"spectr_routed_layers {float(len(engine.layers))}" in text
    assert 'spectr_tokens_total{expert="cats"}' in text
    assert "spectr_requests_running 0.0" in text


def test_a_removed_expert_is_gone_for_the_next_request_and_from_memory(library, mode):
    with served(library, policy=POLICY, batching=mode()) as (address, engine):
        before = {names: answers(address, [(PROMPTS[1], {"experts": list(names)})], False)[0] for names in SETS}
        layer = next(iter(engine.composed.compositions["calibrated"].layers.values()))
        factors = weakref.ref(layer.A_PI)
        del layer
        headers = {"authorization": f"Bearer {ADMIN}"}
        told = httpx.delete(f"{address}/v1/experts/cats", headers=headers, timeout=30)
        assert told.json()["deleted"] is True, told.text
        with OpenAI(base_url=f"{address}/v1", api_key=ALL, max_retries=0) as client:
            with pytest.raises(openai.NotFoundError):
                ask(client, "no", experts=["cats"])
            with pytest.raises(openai.NotFoundError):
                ask(client, "no", model="spectr/cats")
        alike(answers(address, [(PROMPTS[1], {})], False)[0], before["ants", "bees"])
        gc.collect()
        assert factors() is None
        assert all("cats" not in layer.experts for layer in engine.composed.compositions["calibrated"].layers.values())
        assert httpx.delete(f"{address}/v1/experts/cats", headers=headers).status_code == 404
        assert httpx.delete(f"{address}/v1/experts/bees", headers=headers, timeout=30).status_code == 200
        last = httpx.delete(f"{address}/v1/experts/ants", headers=headers)
        assert (last.status_code, last.json()["error"]["code"]) == (409, "expert_not_removable")


def test_removal_waits_for_the_requests_that_were_granted_the_expert(library, mode):
    with served(library, batching=mode()) as (address, engine):
        expected = answers(address, [(PROMPTS[1], {"model": "spectr/cats", "max_tokens": 40})], False)[0]
        with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            stream = ask(client, PROMPTS[1], model="spectr/cats", max_tokens=40, stream=True)
            first = next(stream)
            removal = threading.Thread(
                target=httpx.delete, args=(f"{address}/v1/experts/cats",), kwargs={"timeout": 30}
            )
            removal.start()
            text = "".join(chunk.choices[0].delta.content or "" for chunk in (first, *stream))
            removal.join()
        assert text == expected[0]
        assert engine.experts == engine.composed.experts == ("ants", "bees")


def test_a_request_that_does_not_fit_in_the_cache_next_to_the_others_starts_again(library):
    tight = Batching(cache_tokens=80, batch_tokens=16, requests=8, page=8)
    requests = [
        (prompt, {"experts": list(names), "max_tokens": 30}) for prompt, names in zip(PROMPTS, SETS, strict=False)
    ]
    with served(library) as (address, _):
        expected = answers(address, requests, False)
    with served(library, batching=tight) as (address, engine):
        while (processor := engine.batching.manager._cb.batch_processor) is None:  # its thread has just begun
            time.sleep(0.01)
        offloading = processor.offloading_manager
        evicted, offload = [], offloading.offload_requests
        offloading.offload_requests = lambda: evicted.append(1) or offload()
        for answer, other in zip(answers(address, requests, True), expected, strict=True):
            alike(answer, other)
        assert evicted


def fail_once(engine, monkeypatch):
    """Have the model's next call fail."""
    model, calls = engine.composed.model, []
    head, plain = model.lm_head, model.lm_head.forward

    def forward(*given):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a secret of the machine")
        return plain(*given)

    monkeypatch.setattr(head, "forward", forward)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_fails_is_one_requests_own_matter_and_tells_no_secret(library, monkeypatch, stream):
    with (
        served(library) as (address, engine),
        OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        expected = ask(client, PROMPTS[1]).choices[0].message.content
        for model in ("spectr", "tiny"):  # while its prompt is read, and while it is answered
            fail_once(engine, monkeypatch)
            with pytest.raises(openai.APIError) as caught:
                list(ask(client, PROMPTS[1], model=model, stream=stream))
            assert "secret" not in str(caught.value)
        assert ask(client, PROMPTS[1]).choices[0].message.content == expected


def test_a_dead_worker_is_reported_by_health_and_by_every_answer(library, monkeypatch):
    with served(library, batching=MODES["batched"]()) as (address, engine), open_to(address) as client:
        fail_once(engine, monkeypatch)
        with pytest.raises(openai.InternalServerError):
            ask(client, PROMPTS[1], model="tiny")  # whose prompt is not read before it is answered
        assert httpx.get(f"{address}/health").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, PROMPTS[1])
        assert (caught.value.status_code, caught.value.code) == (503, "engine_error")


def test_a_prompt_that_cannot_be_decided_on_harms_no_other_of_its_batch(library, monkeypatch):
    with served(library, batching=MODES["batched"]()) as (address, engine), open_to(address) as client:
        expected = ask(client, PROMPTS[1], max_tokens=20).choices[0].message.content
        decide = engine.scheduler.router_batch.decide

        def picky(router, experts, ids):
            if experts == ("bees",):
                raise RuntimeError("no")
            return decide(router, experts, ids)

        monkeypatch.setattr(engine.scheduler.router_batch, "decide", picky)
        with ThreadPoolExecutor(4) as pool:
            good = [pool.submit(ask, client, PROMPTS[1], max_tokens=20) for _ in range(3)]
            bad = pool.submit(ask, client, PROMPTS[1], model="spectr/bees")
            assert {one.result().choices[0].message.content for one in good} == {expected}
            with pytest.raises(openai.InternalServerError):
                bad.result()


def test_what_batches_would_ignore_is_refused(library):
    with served(library, batching=MODES["batched"]()) as (address, _):
        told = httpx.post(
            f"{address}/v1/completions", content=json.dumps({"model": "spectr", "prompt": "no", "stop": ["x"]})
        )
        assert (told.status_code, told.json()["error"]["param"]) == (400, "stop")


def test_messages_are_refused_where_the_model_has_no_chat_template(library, monkeypatch):
    with served(library) as (address, engine):
        monkeypatch.setattr(engine.tokenizer, "chat_template", None)
        messages = [{"role": "user", "content": "no"}]
        told = httpx.post(f"{address}/v1/chat/completions", json={"model": "spectr", "messages": messages})
        assert (told.status_code, told.json()["error"]["param"]) == (400, "messages")
        answer = httpx.post(f"{address}/v1/completions", json={"model": "spectr", "prompt": "no", "max_tokens": 2})
        assert answer.status_code == 200
