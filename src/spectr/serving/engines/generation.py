"""Transformers' generation, one request at a time or in continuous batches, where each belongs to its request."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spectr.errors import CompositionError
from spectr.layers.multi_routed import COMPOSED
from spectr.models import growing_cache
from spectr.serving.api_errors import RefusalError
from spectr.serving.engines.batch_scheduling import BatchScheduler, Part, Running
from spectr.serving.engines.stop_texts import StopCriterion, StopFilter, before, stops_of

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
        text, *counts = await asyncio.shield(task)
        return before(text, stops_of(running.body)), *counts


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
        stops, ends = stops_of(running.body), [_left(running)]
        if streamer is not None:
            mark_pieces(streamer, "_enqueue", running, streamer)
        if stops:
            generation_config.stop_strings = None
            ends.append(StopCriterion(stops, given["tokenizer"]._tokenizer))
            if streamer is not None:
                streamer._enqueue = StopFilter(stops, streamer._enqueue)
        sampling(running.body, generation_config)
        with self._scheduler.only(running, input_ids[0]):
            return self._model.generate(
                input_ids=input_ids,
                generation_config=generation_config,
                stopping_criteria=ends,
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


_UNSERVED = ("stop", "frequency_penalty", "presence_penalty", "logit_bias")


@dataclass(kw_only=True)
class Batching:
    """Settings of continuous batching, and its running state.

    Requests share no prefix, so that sets of experts share none either. The model is called step by step, without
    graphs, since each step's tokens have other experts.

    Attributes:
        cache_tokens: Tokens of all running requests in memory; a request that does not fit waits or starts again.
        batch_tokens: Maximum number of tokens per step; longer prompts are read in pieces.
        requests: Maximum number of requests per step.
        page: Tokens per page of the cache.
    """

    cache_tokens: int = 16384
    batch_tokens: int = 512
    requests: int = 32
    page: int = 64

    def start(self, model: Any, scheduler: BatchScheduler, running: Mapping[str, Running]) -> None:
        """Start generating, in a thread that waits for requests."""
        from transformers import ContinuousBatchingConfig
        from transformers.cli.serving.utils import CBGenerateManager

        if isinstance(model.get_output_embeddings(), COMPOSED):
            raise CompositionError(
                "an expert adapts the output head, which continuous batching calls for some tokens only",
                do="serve without continuous batching",
            )
        config = ContinuousBatchingConfig(
            page_size=self.page,
            num_blocks=max(2, self.cache_tokens // self.page),
            max_batch_tokens=self.batch_tokens,
            max_requests_per_batch=self.requests,
            allow_block_sharing=False,
            use_cuda_graph=False,
            use_async_batching=False,
            per_request_processors=True,
        )
        self._running, self._model = running, model
        self.manager: Any = CBGenerateManager(config)
        self.manager.init_cb(model, _sampling_config(model))
        self._cb: Any = self.manager._cb
        self._add = self._cb.add_request
        self._cb.add_request = self._add_request
        scheduler.parts = self._parts

    @property
    def context(self) -> int:
        """Maximum number of tokens of one request."""
        return self.cache_tokens - self.page

    def alive(self) -> bool:
        """Whether the thread is running."""
        return self.manager.is_alive()

    def check(self, body: Mapping[str, Any]) -> None:
        """Raise :class:`RefusalError` for settings that transformers' batches would silently ignore."""
        for key in _UNSERVED:
            if body.get(key):
                raise RefusalError(
                    f"'{key}' does not work with continuous batching",
                    do=f"remove '{key}', or use a server without --batch",
                    code="unsupported_value",
                    param=key,
                )

    def enter(self, model: Any, running: Running) -> Any:
        """The model for transformers' manager; from now on the request can be stopped."""
        running.stop = lambda: self._forget(running.ticket.id)
        return model

    def begun(self, running: Running, queue: asyncio.Queue, streamer: Any) -> None:
        """Record which tokens each piece of text represents."""
        mark_pieces(queue, "put_nowait", running, streamer)

    def paused(self, work: Callable[[], None]) -> None:
        """Change the model between two steps; not on the thread that generates."""
        with self._cb.pause():
            work()

    def stop(self) -> None:
        """Stop generating; unfinished requests fail."""
        self._cb.stop(block=True, timeout=10, hard_stop=True)

    def _add_request(self, input_ids: list[int], request_id: str, **given: Any) -> Any:
        body = self._running[request_id].body
        return self._add(input_ids, request_id=request_id, **given, **_sampling(body, self._model))

    def _forget(self, request_id: str) -> None:
        router = self._cb.output_router
        if request_id in router.result_handlers:  # a finished request has none
            self._cb.cancel_request(request_id)
            with router._lock:
                router.result_handlers.pop(request_id, None)
        while not router.output_queue.empty():  # output for clients that disconnected
            router.output_queue.get_nowait()

    def _parts(self) -> list[Part]:
        """The requests of the next call's tokens, as transformers combined them."""
        batch = self._cb.batch_processor.inputs_and_outputs.requests_in_batch
        return [self._part(future) for future in batch]

    def _part(self, future: Any) -> Part:
        state = future.state

        def fail(error: Exception) -> None:
            self._cb.output_router.fail_and_deliver(state, error)
            self._cb.cancel_request(state.request_id)

        return Part(
            self._running.get(state.request_id), future.query_length, future.has_new_token, state.initial_tokens, fail
        )


def _sampling_config(model: Any) -> Any:
    """A configuration in which every request can have its own settings: each must differ from the value for "off"."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.temperature, config.top_k, config.top_p = True, 0.5, 2, 0.5
    config.use_cache = False
    return config


def _sampling(body: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A request's own temperature, top_k and top_p; greedy decoding is a top_k of 1."""
    default, vocabulary = model.generation_config, model.config.get_text_config().vocab_size
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature == 0 or (temperature is None and top_p is None and not default.do_sample):
        return {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    return {
        "temperature": float(temperature or default.temperature or 1.0),
        "top_k": min(default.top_k or vocabulary, vocabulary),
        "top_p": float(top_p or default.top_p or 1.0),
    }
