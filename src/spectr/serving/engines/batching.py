"""Many requests in one batch: continuous batching of transformers, where each token has its request's experts."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spectr.errors import CompositionError
from spectr.layers.multi_routed import MultiRoutedLinear
from spectr.layers.routed import RoutedLinear
from spectr.layers.saved import SavedModule
from spectr.serving.engines.batch_scheduling import BatchScheduler, Part
from spectr.serving.engines.generation import mark_pieces
from spectr.serving.engines.requests import Running
from spectr.serving.errors import RefusalError

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

        if isinstance(model.get_output_embeddings(), (RoutedLinear, SavedModule, MultiRoutedLinear)):
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
