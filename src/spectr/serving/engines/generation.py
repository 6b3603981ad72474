"""Transformers' generation managers, wrapped: each generation is bound to the request that it works for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spectr.models import growing_cache
from spectr.serving.engines.batch_scheduling import BatchScheduler
from spectr.serving.engines.requests import Running
from spectr.serving.errors import RefusalError

Find = Callable[[str], Running]


class State:
    """Transformers' ``GenerationState``, whose managers are bound to requests.

    Args:
        inner: The state.
        bind: From one of its managers to one that is bound.
        alive: Whether the batches' thread lives.
    """

    def __init__(self, inner: Any, bind: Callable[[Any], Any], alive: Callable[[], bool]):
        self._inner, self._bind, self._alive = inner, bind, alive

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """The model's manager, bound."""
        return self._bind(self._inner.get_manager(model_id, use_cb=False))

    def is_cb_alive(self) -> bool:
        """What ``/health`` wants to know."""
        return self._alive()


class Bound:
    """A generation manager that checks a request's length and has its set in force while it generates.

    Args:
        inner: Transformers' manager.
        find: A request by its id.
        context: Tokens that the model takes at most, answer included.
        enter: From the model and a request to what is given to the inner manager as the model.
        begun: Gets a stream before its first token.
        ends: Whether a generation that is no longer waited for comes to an end by itself, and must be let to.
    """

    def __init__(
        self,
        inner: Any,
        find: Find,
        context: int,
        enter: Callable[[Any, Running], Any],
        begun: Callable[[Running, asyncio.Queue, Any], None] = lambda *_: None,
        *,
        ends: bool = True,
    ):
        self._inner, self._find, self._context, self._enter = inner, find, context, enter
        self._begun, self._ends = begun, ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue, Any]:
        """See transformers' ``BaseGenerateManager``."""
        running = self._find(request_id)
        fit(running, inputs, gen_config, self._context)
        queue, streamer = self._inner.generate_streaming(
            self._enter(model, running), processor, inputs, gen_config, request_id, response_parser=response_parser
        )
        self._begun(running, queue, streamer)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """See transformers' ``BaseGenerateManager``."""
        running = self._find(request_id)
        fit(running, inputs, gen_config, self._context)
        work = self._inner.generate_non_streaming(
            self._enter(model, running), processor, inputs, gen_config, request_id
        )
        if not self._ends:
            return await work
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # which no one else reads
        return await asyncio.shield(task)


class OneAtATime:
    """The model as one request's generation sees it: with the request's set, until it is done or its client has left.

    Args:
        model: The composed model.
        running: The request.
        scheduler: Gives its tokens their set.
    """

    def __init__(self, model: Any, running: Running, scheduler: BatchScheduler):
        self._model, self._running, self._scheduler = model, running, scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *, input_ids: torch.Tensor, generation_config: Any, **given: Any) -> torch.Tensor:
        """See transformers' ``GenerationMixin.generate``."""
        running, streamer = self._running, given.get("streamer")
        if running.over.is_set():  # its client left while others were answered
            if streamer is not None:
                streamer.end()
            return input_ids
        if streamer is not None:
            mark_pieces(streamer, "_enqueue", running, streamer)
        sampling(running.body, generation_config)
        with self._scheduler.only(running, input_ids[0]):
            return self._model.generate(
                input_ids=input_ids,
                generation_config=generation_config,
                stopping_criteria=[_left(running)],
                **{"past_key_values": growing_cache(self._model)} | given,
            )


def fit(running: Running, inputs: Mapping[str, Any], gen_config: Any, context: int) -> None:
    """Shorten the answer to what the model can take.

    Raises:
        RefusalError: The prompt alone is too long, or empty.
    """
    ids, param = inputs["input_ids"], "messages" if "messages" in running.body else "prompt"
    tokens = len(ids) if isinstance(ids, list) else ids.shape[-1]
    if tokens == 0:
        raise RefusalError("the prompt has no token", expected="one or more", code="invalid_value", param=param)
    if tokens >= context:
        raise RefusalError(
            f"the prompt has {tokens} tokens",
            expected=f"less than the model's context of {context}, which the answer has to fit in too",
            code="context_length_exceeded",
            param=param,
        )
    gen_config.max_new_tokens = min(gen_config.max_new_tokens or context, context - tokens)


def sampling(body: Mapping[str, Any], gen_config: Any) -> None:
    """Sample where a temperature is given; set the seed, as nothing else samples meanwhile."""
    if body.get("temperature") or (body.get("top_p") is not None and body.get("temperature") is None):
        gen_config.do_sample = True
    if body.get("seed") is not None:
        torch.manual_seed(body["seed"])


def mark_pieces(owner: Any, way: str, running: Running, streamer: Any) -> None:
    """Write down, for each piece of text that is handed on by ``owner.way``, how many tokens there were by then."""
    hand_on = getattr(owner, way)

    def marked(item: Any) -> None:
        if item is not None:
            running.marks.append(streamer.total_tokens)
        hand_on(item)

    setattr(owner, way, marked)


def _left(running: Running) -> Callable[..., torch.Tensor]:
    def left(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), running.over.is_set(), dtype=torch.bool, device=input_ids.device)

    return left
