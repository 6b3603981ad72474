"""vLLM behind the gateway: its own OpenAI-compatible application, with each request's experts in ``vllm_xargs``."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from spectr.choosing import fit_to, open_composed
from spectr.composed_model.quantization_config import METHOD, Settings
from spectr.errors import CompositionError, MissingExtraError, SpectrError
from spectr.folders import json_object
from spectr.models import fetch_default_model
from spectr.routers.router_config import router_config
from spectr.serving.api_errors import RefusalError
from spectr.serving.engines.engine import Step, Ticket
from spectr.serving.outliers import outliers_among
from spectr.serving.run import listen
from spectr.serving.server_settings import ServerSettings
from spectr.vllm.prompt_decisions import DECIDES, Decider
from spectr.vllm.register import check_version, engine_version
from spectr.vllm.requests import EXPERTS, ROUTE_ID, ROUTER, ROUTING
from spectr.vllm.router_set import decides_on_prompts, probe_tokens, routers_of, supported
from spectr.vllm.routing_records import Listener

INNER = "spectr"  # name of the composed model in vLLM's application
_PATIENCE = 0.25  # seconds that an answer waits for its reports
_ROUTING = {"shares": "tokens", "layers": "layers"}
# Fields with which a client could set what the ticket sets, or access other clients' data.
_NOT_THE_CLIENTS = ("vllm_xargs", "cache_salt", "request_id", "priority", "return_token_ids", "user")
_NOT_HERE = ("use_beam_search", "kv_transfer_params", "ec_transfer_params", "prompt_embeds", "structural_tag")
_REQUEST = re.compile(r"(?:(?P<child>\d+)_)?(?:chat)?cmpl-(?P<id>\w+?)(?:-(?P<prompt>\d{1,4}))?(?:-[0-9a-f]{8})?")


class VllmEngine:
    """A running vLLM engine with a routed model. See :class:`spectr.serving.engines.Engine`.

    Args:
        client: vLLM's ``AsyncLLM``.
        status: Status of the routing, from the workers.
        listener: Receives the reports.
        base_model: The base model's name for clients.
        routers: Clients' names of the routers, the default first, each with its name in the model's config.
        outlier_scores: Experts whose norm is an outlier, with a score.
        records: Whether the layers record their choices.
        p: The result for a request's prompt by vLLM's name of the request; see :class:`Decider`.
    """

    def __init__(
        self,
        client: Any,
        status: Mapping[str, Any],
        listener: Listener,
        *,
        base_model: str,
        routers: Mapping[str, str],
        outlier_scores: Mapping[str, float] | None = None,
        records: bool = True,
        p: Mapping[str, float] | None = None,
    ):
        self.client, self.listener, self.base_model, self.records = client, listener, base_model, records
        self.routers, self._inner, self.outlier_scores = tuple(routers), dict(routers), dict(outlier_scores or {})
        self._p = {} if p is None else p
        self.layers, self._known = tuple(status["names"]), tuple(status["experts"])
        self.experts = self._known
        self._choices: dict[str, int] = {}
        self._waiting: dict[str, dict[tuple[int, int], Step]] = {}
        self._reported: dict[str, dict[int, int]] = {}

    @property
    def fields(self) -> frozenset[str]:
        """See :class:`Engine`."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        return frozenset(ChatCompletionRequest.model_fields) | frozenset(CompletionRequest.model_fields)

    def admit(self, ticket: Ticket, body: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`Engine`."""
        if self.client.errored:
            raise RefusalError("the engine stopped unexpectedly", code="engine_dead", status=503)
        for field in _NOT_HERE:
            if body.get(field):
                raise RefusalError(f"{field} is not supported", code="unsupported_parameter", param=field)
        admitted = {key: value for key, value in body.items() if key not in _NOT_THE_CLIENTS}
        extra: dict[str, Any] = {EXPERTS: list(ticket.experts), ROUTER: self._inner[ticket.router]}
        if ticket.record != "none" and self.records:
            extra |= {ROUTING: _ROUTING[ticket.record], ROUTE_ID: ticket.id}
            admitted["return_token_ids"] = True  # returns the number of tokens of a chunk
            self._choices[ticket.id] = body.get("n") or 1
            self._waiting[ticket.id], self._reported[ticket.id] = {}, {}
            self.listener.expect(ticket.id)
        if body.get("stream"):
            admitted["stream_options"] = {
                "include_usage": True
            }  # for counting; the gateway decides what the client sees
        admitted |= {"model": INNER, "vllm_xargs": extra}
        if ticket.salt:
            admitted["cache_salt"] = ticket.salt  # in addition to the engine's own salt, which no client knows
        return admitted

    def steps(self, ticket: Ticket, answer: dict[str, Any]) -> Mapping[int, Sequence[Step]]:
        """See :class:`Engine`. Reports leave the engine before their tokens do; this waits for them briefly."""
        fresh = {choice.get("index", 0): _tokens(choice) for choice in answer.get("choices") or ()}
        answer.pop("prompt_token_ids", None)
        if ticket.id not in self._reported:
            return {}
        reported, waiting = self._reported[ticket.id], self._waiting[ticket.id]
        wanted = {(c, reported.get(c, 0) + n) for c, count in fresh.items() for n in range(count)}
        until = time.monotonic() + _PATIENCE
        while not wanted <= set(waiting) and (left := until - time.monotonic()) > 0:
            for report in self.listener.take(ticket.id, tokens=1, timeout=left):
                waiting[self._place(report)] = self._step(report)
        found: dict[int, list[Step]] = {}
        for choice, number in sorted(wanted):
            step = waiting.pop((choice, number), Step({}))
            found.setdefault(choice, []).append(step._replace(p=self._p_of(ticket, choice)))
            reported[choice] = number + 1
        return found

    def finish(self, ticket: Ticket) -> None:
        """See :class:`Engine`."""
        for kept in (self._choices, self._waiting, self._reported):
            kept.pop(ticket.id, None)
        self.listener.forget(ticket.id)

    async def discard(self, name: str) -> None:
        """See :class:`Engine`. Running requests continue without the expert."""
        if name not in self.experts or len(self.experts) == 1:
            raise CompositionError(f"'{name}' cannot be removed", expected=f"one of several: {', '.join(self.experts)}")
        self.experts = tuple(expert for expert in self.experts if expert != name)
        await self.client.collective_rpc("spectr_remove", args=(name,))
        self.outlier_scores.pop(name, None)

    def metrics(self) -> bytes:
        """See :class:`Engine`."""
        from prometheus_client import generate_latest

        return generate_latest()

    def _p_of(self, ticket: Ticket, choice: int) -> float | None:
        """The result for the prompt of a choice, under the names that vLLM's handlers give a request."""
        prompt = choice // self._choices.get(ticket.id, 1)
        names = (f"chatcmpl-{ticket.id}", f"cmpl-{ticket.id}-{prompt}", f"cmpl-{ticket.id}")
        return next((self._p[name] for name in names if name in self._p), None)

    def _place(self, report: Mapping[str, Any]) -> tuple[int, int]:
        """The choice and the index of the token that a report describes."""
        named = _REQUEST.fullmatch(report["request"])
        child, prompt = (int(named[key] or 0) for key in ("child", "prompt")) if named else (0, 0)
        return prompt * self._choices.get(report["id"], 1) + child, report["token"]

    def _step(self, report: Mapping[str, Any]) -> Step:
        shares = {self._known[expert]: share for expert, share in report["shares"]}
        layers = [{self._known[e]: (weight, score) for e, weight, score in one} for one in report.get("by_layer", ())]
        return Step(shares, layers)


def _tokens(choice: dict[str, Any]) -> int:
    """The number of new tokens of a choice; removes the fields that carry them."""
    choice.pop("prompt_token_ids", None)
    return len(choice.pop("token_ids", None) or ())


@asynccontextmanager
async def launched(
    model: str,
    settings: Settings | None = None,
    *,
    base_model: str,
    routers: Mapping[str, str] | None = None,
    record: bool = True,
    options: Sequence[str] = (),
) -> AsyncIterator[tuple[Any, VllmEngine]]:
    """vLLM's application and its engine, for a :class:`spectr.serving.gateway.Gateway`.

    Args:
        model: A composed folder; or, with ``settings``, any model that vLLM supports, by folder or Hub id.
        settings: The routing, if the folder does not describe it.
        base_model: The base model's name for clients.
        routers: See :class:`VllmEngine`; by default those of the settings.
        record: Whether routing can be returned and counted; costs a little at each layer.
        options: Options of vLLM's own command line.

    Raises:
        MissingExtraError: vLLM is not installed.
        CompositionError: The model cannot be routed, or vLLM has another version.
    """
    if engine_version() is None:
        raise MissingExtraError("serving with vLLM", "vllm")
    check_version()
    settings = settings or _of_folder(model)
    closed = replace(
        settings, access="closed", record=record
    )  # a request that bypasses the gateway gets the base model
    prompts, listener = routers_of(closed).prompts, Listener()
    if prompts:
        os.environ[DECIDES] = "1"
    try:
        arguments = ["--model", model, "--served-model-name", INNER, "--hf-overrides"]
        arguments += [json.dumps({"quantization_config": closed.as_config()}), *options]
        async with _application(arguments) as (app, client):
            [status, *_] = await client.collective_rpc("spectr_status")
            library = closed.open_library(model)
            decider = None
            if prompts:
                decider = Decider(client, library, prompts, probe_tokens(next(iter(prompts.values()))))
                await decider.read_null()
            yield (
                app,
                VllmEngine(
                    client,
                    status,
                    listener,
                    base_model=base_model,
                    routers=routers or {name: name for name in settings.make_routers()},
                    outlier_scores=outliers_among(library[name] for name in library),
                    records=record,
                    p=None if decider is None else decider.p,
                ),
            )
    finally:
        listener.close()
        os.environ.pop(DECIDES, None)


def launch(settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Start vLLM with a routed model, and serve until the process is interrupted: ``spectr serve --engine vllm``.

    Args:
        settings: What to serve.
        say: Prints one line.

    Raises:
        CompositionError: The model cannot be routed, or no layer of it is.
        SpectrError: vLLM refuses an option, or its engine stopped unexpectedly.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # before vLLM is imported
    routed = _routed(settings)
    with settings.listen() as bound:
        model = settings.model or str(fetch_default_model(say))
        say(f"starting vLLM with {model}; compiling takes a minute or two; -- --enforce-eager skips it")
        signal.signal(signal.SIGTERM, _end)
        asyncio.run(_serve(settings, routed, model, bound, say))


def _end(number: int, frame: Any) -> None:
    """End by an exception; exiting at once would leave the engine's processes running."""
    raise SystemExit(128 + number)


def _routed(settings: ServerSettings) -> Settings:
    """The routing in the model's config."""
    routers = [fit_to(len(settings.experts), supported(router)) for router in settings.routers.values()]
    order = sorted(routers, key=decides_on_prompts)  # the default is one that does not decide on prompts
    first, *others = map(router_config, order)
    everyone = settings.experts == settings.library.names
    routed = Settings(
        library=str(Path(settings.library.origin).expanduser().absolute()),
        router=first,
        other_routers=tuple(others),
        experts=None if everyone else settings.experts,
        inner=_inner(settings.model),
    )
    routers_of(routed)
    return routed


def _inner(model: str | None) -> dict[str, Any] | None:
    """A base model's own quantisation."""
    found = json_object(Path(model) / "config.json").get("quantization_config") if model else None
    return found.get("inner") if found and found.get("quant_method") == METHOD else found


async def _serve(
    settings: ServerSettings, routed: Settings, model: str, bound: socket.socket, say: Callable[[str], None]
) -> None:
    started = launched(
        model,
        routed,
        base_model=settings.base_name,
        routers={name: router_config(router)["name"] for name, router in settings.routers.items()},
        options=["--dtype", settings.dtype, *settings.options],
    )
    async with started as (app, engine):

        async def watch(server: Any) -> None:
            app.state.server = server  # vLLM's own handlers read it here
            while not engine.client.errored:
                await asyncio.sleep(0.5)
            server.should_exit = True

        await listen(app, engine, settings, bound, say, watch)
        if engine.client.errored:
            raise SpectrError("vLLM's engine stopped unexpectedly; its output is above", do="start the server again")


def _of_folder(model: str) -> Settings:
    settings = open_composed(model)
    if settings is None:
        raise CompositionError(
            f"{model} is not a composed folder",
            expected=f'a config.json whose quantization_config has "quant_method": "{METHOD}"',
            do="create one: spectr compose --save FOLDER; or name a library",
        )
    return settings


@asynccontextmanager
async def _application(arguments: Sequence[str]) -> AsyncIterator[tuple[Any, Any]]:
    """vLLM's application and its client, built as by vLLM's own command."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(list(arguments))
    validate_parsed_serve_args(parsed)
    async with AsyncExitStack() as stack:
        with _sheltered():
            client = await stack.enter_async_context(build_async_engine_client(parsed))
        tasks = await client.get_supported_tasks()
        app = build_app(parsed, tasks, client.model_config)
        await init_app_state(client, app.state, parsed, tasks)
        yield app, client


@contextmanager
def _sheltered() -> Iterator[None]:
    """Processes of an engine that starts inside ignore a terminal's Ctrl-C; the parent process ends them."""
    from vllm.v1.engine.utils import CoreEngineProcManager

    plain = CoreEngineProcManager.__init__
    resource_tracker.ensure_running()  # else the first new process would start it, which unblocks the signal

    def start(*args: Any, **kwargs: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # new processes inherit it
        try:
            plain(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    CoreEngineProcManager.__init__ = start
    try:
        yield
    finally:
        CoreEngineProcManager.__init__ = plain
