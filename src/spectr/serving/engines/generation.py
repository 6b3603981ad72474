"""Wrap transformers' generation managers, so that each generation belongs to its request."""

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
        bind: Binds one of its managers.
        alive: Whether the thread of the batches runs.
    """

    def __init__(self, inner: Any, bind: Callable[[Any], Any], alive: Callable[[], bool]):
        self._inner, self._bind, self._alive = inner, bind, alive

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """The model's manager, bound."""
        return self._bind(self._inner.get_manager(model_id, use_cb=False))

    def is_cb_alive(self) -> bool:
        """Used by ``/health``."""
        return self._alive()


class Bound:
    """A generation manager that checks a request's length and applies its experts while it generates.

    Args:
        inner: Transformers' manager.
        find: Finds a request by its id.
        context: Maximum number of tokens of the model, including the answer.
        enter: Maps the model and a request to the model for the inner manager.
        begun: Receives a stream before its first token.
        ends: Whether a generation that nobody waits for ends by itself, and must be left to do so.
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
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nothing else reads it
        return await asyncio.shield(task)


class OneAtATime:
    """The model for one request's generation: with the request's experts, until it ends or its client disconnects.

    Args:
        model: The composed model.
        running: The request.
        scheduler: Gives its tokens their experts.
    """

    def __init__(self, model: Any, running: Running, scheduler: BatchScheduler):
        self._model, self._running, self._scheduler = model, running, scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *, input_ids: torch.Tensor, generation_config: Any, **given: Any) -> torch.Tensor:
        """See transformers' ``GenerationMixin.generate``."""
        running, streamer = self._running, given.get("streamer")
        if running.over.is_set():  # its client disconnected while it waited
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
    """Shorten the answer to the model's context.

    Raises:
        RefusalError: The prompt alone is too long, or is empty.
    """
    ids, param = inputs["input_ids"], "messages" if "messages" in running.body else "prompt"
    tokens = len(ids) if isinstance(ids, list) else ids.shape[-1]
    if tokens == 0:
        raise RefusalError("the prompt is empty", expected="at least one token", code="invalid_value", param=param)
    if tokens >= context:
        raise RefusalError(
            f"the prompt has {tokens} tokens",
            expected=f"less than the model's context of {context} tokens, which includes the answer",
            code="context_length_exceeded",
            param=param,
        )
    gen_config.max_new_tokens = min(gen_config.max_new_tokens or context, context - tokens)


def sampling(body: Mapping[str, Any], gen_config: Any) -> None:
    """Sample if a temperature is given; sets the seed, since nothing else samples meanwhile."""
    if body.get("temperature") or (body.get("top_p") is not None and body.get("temperature") is None):
        gen_config.do_sample = True
    if body.get("seed") is not None:
        torch.manual_seed(body["seed"])


def mark_pieces(owner: Any, way: str, running: Running, streamer: Any) -> None:
    """Record the number of tokens so far for each piece of text that ``owner.way`` passes on."""
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
