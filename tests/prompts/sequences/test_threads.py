"""Calls at the same time, changes while others generate, and calls that fail."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sequences import say

import spectr
from spectr.errors import CompositionError
from spectr.layers.batch_routing import thread
from spectr.prompts import calls


def test_threads_and_tasks(world, shared):
    model, routed, prompts = shared
    (a, one), (_, two) = prompts
    want = {(name, n): say(world.oracle(name), ids) for name in (one, two) for n, (ids, _) in enumerate(prompts)}
    verdicts = [routed.prompt.decide(input_ids=ids) for ids, _ in prompts]
    before = {name: {key: id(value) for key, value in vars(layer).items()} for name, layer in routed.layers.items()}

    def rounds(n):
        for _ in range(3):
            assert torch.equal(say(model, prompts[n % 2][0]), want[prompts[n % 2][1], n % 2])

    def using(n):
        with routed.prompt.using(verdicts[n % 2]):
            assert torch.equal(say(model, a), want[prompts[n % 2][1], 0])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(torch.no_grad()(rounds), range(8)))
        list(pool.map(torch.no_grad()(using), range(8)))

    async def task(n):
        with routed.prompt.using(verdicts[1 - n % 2]):
            await asyncio.sleep(0.002 * (n % 3))
            assert torch.equal(say(model, prompts[n % 2][0]), want[prompts[1 - n % 2][1], n % 2])
            said = await asyncio.to_thread(torch.no_grad()(say), model, prompts[n % 2][0])
            assert torch.equal(said, want[prompts[1 - n % 2][1], n % 2])

    async def plain(n):
        await asyncio.sleep(0.001)
        rounds(n)
        await asyncio.to_thread(torch.no_grad()(rounds), n)

    async def together():
        await asyncio.gather(*(way(n) for n in range(3) for way in (task, plain)))

    asyncio.run(together())
    after = {name: {key: id(value) for key, value in vars(layer).items()} for name, layer in routed.layers.items()}
    assert after == before


def test_changes_while_others_generate(world, shared):
    """Calls that wait for a change go on with the experts that there are then, and do not keep the change waiting."""
    (ids, one), (_, two) = shared[2]
    model, routed = world.routed(spectr.Calibrated())
    answers = [say(world.oracle(name), ids).tolist() for name in (one, two)]
    wrong, stop = [], threading.Event()

    @torch.no_grad()
    def generate():
        while not stop.is_set():
            try:
                said = say(model, ids).tolist()
                wrong.extend([] if said in answers else [said])
            except Exception as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=generate) for _ in range(4)]
    for one_of_them in threads:
        one_of_them.start()
    try:
        for _ in range(5):
            routed.allow([two])
            routed.allow(None)
    finally:
        stop.set()
        for one_of_them in threads:
            one_of_them.join()
    assert not wrong

    class Streamer:
        def put(self, value):
            with pytest.raises(CompositionError):
                routed.allow([two])

        def end(self):
            self.inner = say(model, shared[2][1][0])

    assert say(model, ids, streamer=(streamer := Streamer())).tolist() == answers[0]
    assert torch.equal(streamer.inner, say(world.oracle(one), shared[2][1][0]))  # a generate inside another inherits


def test_nothing_is_left_where_a_call_fails(world, shared):
    model, routed, ((ids, name), _) = shared

    def fail(*_):
        raise RuntimeError("no memory")

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    for call in (lambda: say(model, ids), lambda: model(ids), lambda: model.model(ids)):
        with pytest.raises(RuntimeError, match="no memory"):
            call()
    hook.remove()
    assert thread.routing is None
    assert not calls._stack.inside
    assert not routed._exclusion._running
    assert torch.equal(say(model, ids), say(world.oracle(name), ids))
