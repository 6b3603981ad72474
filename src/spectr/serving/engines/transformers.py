"""Serve with transformers' own code: its handlers, its model manager, its generation.

Requests run one at a time, or many at once with continuous batching (:mod:`spectr.serving.engines.generation`).
Transformers' classes are wrapped, not subclassed; they know a request by its id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from spectr.composition.multi_router import MultiRouter
from spectr.errors import CompositionError, MissingExtraError, SpectrError, nearest
from spectr.models import context_length
from spectr.serving.api_errors import RefusalError, shown
from spectr.serving.engines.batch_scheduling import BatchScheduler, Running
from spectr.serving.engines.engine import Step, Ticket
from spectr.serving.engines.generation import Batching, Bound, OneAtATime, State

TESTED = ((5, 23), (5, 24))  # at least, and below
_NAME = "spectr"  # name of the composed model in transformers' code
_UNSERVED = ("logprobs", "top_logprobs", "generation_config", "best_of", "echo", "audio", "suffix")
_UNSERVED += ("functions", "function_call", "tools", "tool_choice", "presence_penalty")
_UNSERVED += ("reasoning_effort", "verbosity", "web_search_options")
_ROLES = ("system", "user", "assistant", "tool", "developer")
_TEMPLATE_OPTIONS = frozenset({"enable_thinking"})

log = logging.getLogger("spectr.serving")


class TransformersEngine:
    """The composed model behind transformers' serving code. See :class:`spectr.serving.engines.Engine`.

    Args:
        composed: The model and its routers; must not be used elsewhere while this engine runs.
        tokenizer: The model's.
        base_model: The base model's name for clients.
        outlier_scores: Experts whose norm is an outlier, with a score.
        batching: Continuous batching; ``None`` for one request at a time.

    Attributes:
        app: The ASGI application, for a :class:`spectr.serving.gateway.Gateway`.

    Raises:
        CompositionError: A router cannot serve several sets of experts.
        SpectrError: The installed transformers version was not tested with this engine.
    """

    def __init__(
        self,
        composed: MultiRouter,
        tokenizer: Any,
        *,
        base_model: str,
        outlier_scores: Mapping[str, float] | None = None,
        batching: Batching | None = None,
    ):
        check_version()
        self.composed, self.tokenizer, self.base_model, self.batching = composed, tokenizer, base_model, batching
        self.routers, self.outlier_scores = tuple(composed.compositions), dict(outlier_scores or {})
        self.experts, self.layers = composed.experts, composed.layers
        self._running: dict[str, Running] = {}
        self._left = asyncio.Event()
        self.scheduler = BatchScheduler(composed)
        self._state = self._make_state()
        self.app = self._application()

    @property
    def fields(self) -> frozenset[str]:
        """See :class:`Engine`."""
        from transformers.cli.serving.chat_completion import TransformersCompletionCreateParamsStreaming as Chat
        from transformers.cli.serving.completion import TransformersTextCompletionCreateParams as Text

        return frozenset(Chat.__annotations__) | frozenset(Text.__annotations__)

    def admit(self, ticket: Ticket, body: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`Engine`."""
        admitted: dict[str, Any] = {key: value for key, value in body.items() if value not in (None, [], {})}
        admitted["model"] = _NAME
        _check(admitted, len(self.tokenizer))
        if "messages" in admitted and not self.tokenizer.chat_template:
            raise RefusalError(
                "the model has no chat template, so it cannot read messages",
                do="send a prompt to /v1/completions, or give the model's tokenizer a chat template",
                code="unsupported_value",
                param="messages",
            )
        if self.batching is not None:
            self.batching.check(admitted)
        if admitted.get("stop") and not admitted.get("stream") and self._parses:
            raise _unserved("stop", "no 'stop' in an answer that this model's response template parses; or a stream")
        if "logit_bias" in admitted:  # transformers fails on whole numbers
            admitted["logit_bias"] = {token: float(bias) for token, bias in admitted["logit_bias"].items()}
        self._running[ticket.id] = Running(ticket, admitted)
        return admitted

    @property
    def _parses(self) -> bool:
        """Whether transformers parses complete answers from their tokens, which it does not let us shorten."""
        from transformers.cli.serving.utils import get_response_template

        model: Any = self.composed.model
        return get_response_template(self.tokenizer, model) is not None

    def steps(self, ticket: Ticket, answer: dict[str, Any]) -> Mapping[int, Sequence[Step]]:
        """See :class:`Engine`."""
        return self._running[ticket.id].take(answer)

    def finish(self, ticket: Ticket) -> None:
        """See :class:`Engine`."""
        running = self._running.pop(ticket.id)
        running.over.set()
        running.stop()
        self._left.set()

    async def discard(self, name: str) -> None:
        """See :class:`Engine`."""
        if name not in self.experts:
            raise SpectrError(f"there is no expert '{name}'")
        if len(self.experts) == 1:
            raise CompositionError(f"'{name}' is the last expert", do="stop the server instead")
        self.experts = tuple(other for other in self.experts if other != name)
        while any(name in running.ticket.experts for running in self._running.values()):
            self._left.clear()
            await self._left.wait()
        await self._between_calls(lambda: self.scheduler.router_batch.discard(name))
        self.outlier_scores.pop(name, None)

    def metrics(self) -> bytes:
        """See :class:`Engine`."""
        return b""

    def stop(self) -> None:
        """Stop running calls; returns after the model's current call. A thread that is cut off inside a call would
        crash the process. Call it while the event loop exists."""
        for running in self._running.values():
            running.over.set()
        if self.batching is not None:
            self.batching.stop()
        else:
            with suppress(TimeoutError):
                self._state.get_manager(_KEY).submit(lambda: None).result(_LAST_CALL)

    def close(self) -> None:
        """Stop running calls, and restore the model as it was composed."""
        self.stop()
        self.scheduler.close()

    async def _between_calls(self, work: Callable[[], None]) -> None:
        """Change the model while it does not run."""
        if self.batching is not None:
            await asyncio.to_thread(self.batching.paused, work)
        else:
            await self._state.get_manager(_KEY).async_submit(work)

    def _find(self, request_id: str) -> Running:
        found = self._running.get(request_id)
        if found is None:
            raise RefusalError("this request has ended", code="request_cancelled", status=400)
        return found

    def _make_state(self) -> State:
        from transformers.cli.serving.utils import GenerationState

        context = context_length(self.composed.model) or 1 << 30
        if self.batching is not None:
            self.batching.start(self.composed.model, self.scheduler, self._running)
            context = min(context, self.batching.context)
            batching = self.batching
            bound = Bound(batching.manager, self._find, context, batching.enter, batching.begun, ends=False)
            return State(GenerationState(continuous_batching=True), lambda _: bound, batching.alive)

        def one(model: Any, running: Running) -> OneAtATime:
            return OneAtATime(model, running, self.scheduler)

        return State(GenerationState(), lambda inner: Bound(inner, self._find, context, one), lambda: True)

    def _application(self) -> Any:
        from transformers.cli.serving.chat_completion import ChatCompletionHandler
        from transformers.cli.serving.completion import CompletionHandler
        from transformers.cli.serving.model_manager import ModelManager, TimedModel
        from transformers.cli.serving.server import build_server

        state: Any = self._state
        manager = ModelManager(model_timeout=-1)
        manager.loaded_models[_KEY] = TimedModel(self.composed.model, -1, self.tokenizer)  # pyright: ignore[reportArgumentType]
        chat, complete = ChatCompletionHandler(manager, state), CompletionHandler(manager, state)
        unreachable: Any = None  # the gateway passes no request to other endpoints
        app = build_server(manager, chat, complete, unreachable, unreachable, unreachable, state)
        _explain_refusals(app)
        return app


_KEY = f"{_NAME}@main"
_LAST_CALL = 10.0  # seconds for the model's running call at the end


def check_version() -> None:
    """Raise :class:`SpectrError` for a transformers version whose serving code may differ."""
    if not all(map(find_spec, ("fastapi", "uvicorn"))):
        raise MissingExtraError("serving", "serve")
    installed = version("transformers")
    number = tuple(int(part) for part in installed.split(".")[:2])
    if not TESTED[0] <= number < TESTED[1]:
        least, most = (".".join(map(str, bound)) for bound in TESTED)
        raise SpectrError(
            f"transformers {installed} is installed",
            expected=f"at least {least} and below {most}, the tested versions",
            do=f'pip install "transformers[serving]>={least},<{most}"',
        )


def _explain_refusals(app: Any) -> None:
    """Make the application answer refusals, and templates' errors, with status 400 instead of 500."""
    from fastapi.responses import Response
    from jinja2 import TemplateError

    async def refuse(_: Any, error: Any) -> Response:
        return Response(error.body, error.status, media_type="application/json")

    async def refuse_template(_: Any, error: Any) -> Response:
        refusal = RefusalError(f"the chat template raised an error: {error}", code="invalid_value", param="messages")
        return Response(refusal.body, 400, media_type="application/json")

    app.add_exception_handler(RefusalError, refuse)
    app.add_exception_handler(TemplateError, refuse_template)


def _check(body: Mapping[str, Any], vocabulary: int) -> None:
    """Raise :class:`RefusalError` for what this engine would ignore or fail on."""
    for key in _UNSERVED:
        if body.get(key):
            raise _unserved(key)
    bias, options = body.get("logit_bias", {}), body.get("chat_template_kwargs", {})
    tokens = all(key.isascii() and key.isdigit() and int(key) < vocabulary for key in bias)
    known = isinstance(options, dict) and set(options) <= _TEMPLATE_OPTIONS
    for key, possible, expected in (
        ("n", body.get("n", 1) == 1, "1, one answer per request"),
        ("prompt", isinstance(body.get("prompt", ""), str), "one text"),
        ("logit_bias", not bias or "prompt" not in body, None),  # transformers applies it in chats only
        ("frequency_penalty", body.get("frequency_penalty", 0) > -1, "more than -1"),
        ("modalities", body.get("modalities", ["text"]) == ["text"], '["text"]'),
        ("logit_bias", tokens, "the model's token ids as keys"),
        ("chat_template_kwargs", known, f"only {', '.join(sorted(_TEMPLATE_OPTIONS))}"),
        ("response_format", (body.get("response_format") or {}).get("type", "text") == "text", '{"type": "text"}'),
    ):
        if not possible:
            raise _unserved(key, expected)
    for number, message in enumerate(body.get("messages", ())):
        _check_message(f"messages[{number}]", message)


def _check_message(place: str, message: Mapping[str, Any]) -> None:
    _check_calls(message.get("tool_calls", ()))
    found = [(f"{place}.role", message["role"], _ROLES)]
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    found += [(f"{place}.content[{number}].type", part["type"], ("text",)) for number, part in enumerate(parts)]
    for where, value, possible in found:
        if value not in possible:
            near = nearest(value, possible)
            raise RefusalError(
                f"'{where}' is {shown(value)}, which is not supported",
                expected=" or ".join(f'"{one}"' for one in possible),
                do=f'use "{near}" if you mean that' if near else None,
                code="unsupported_value",
                param="messages",
            )


def _check_calls(calls: Any) -> None:
    import json

    try:
        for call in calls or ():
            arguments = (call.get("function") or call)["arguments"]
            if isinstance(arguments, str):
                json.loads(arguments)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _unserved("messages", "tool calls with a function and its arguments as JSON") from None


def _unserved(key: str, expected: str | None = None) -> RefusalError:
    return RefusalError(
        f"'{key}' has an unsupported value" if expected else f"'{key}' is not supported",
        expected=expected,
        do=f"change '{key}'" + ("" if key in ("messages", "prompt") else ", or remove it"),
        code="unsupported_value",
        param=key,
    )
