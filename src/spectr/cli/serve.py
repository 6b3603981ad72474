"""``spectr serve``."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectr.cli.console import say
from spectr.cli.options import Routing, with_routing
from spectr.errors import LibraryError, MissingExtraError, SpectrError

if TYPE_CHECKING:
    from spectr.routers import Router
    from spectr.serving.engines.batching import Batching
    from spectr.serving.settings import Settings

_ENGINES = ("transformers", "vllm")


@with_routing
def serve(
    routing: Routing,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="vllm: options of its own, such as -- --max-model-len 2048."),
    ] = None,
    engine: Annotated[str, typer.Option(help="transformers, or vllm where that is installed.")] = "transformers",
    host: Annotated[str, typer.Option(help="Address to listen at; without a policy a loopback one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 for a free one.", min=0, max=65535)] = 8000,
    policy: Annotated[
        Path | None, typer.Option(help="YAML or JSON: which API key may use which experts. See docs/serving.md.")
    ] = None,
    served_name: Annotated[str, typer.Option(help="The composed model's name for clients.")] = "spectr",
    exclude: Annotated[
        list[str] | None, typer.Option("--except", help="Experts that are not loaded: once for each.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Count tokens by expert for every request, for /metrics.")
    ] = True,
    batch: Annotated[
        bool, typer.Option("--batch/--no-batch", help="transformers: many requests at once, by continuous batching.")
    ] = False,
    cache_tokens: Annotated[
        int, typer.Option(help="With --batch: tokens of all running requests that are kept in memory.", min=256)
    ] = 16384,
    grace: Annotated[
        float, typer.Option(help="Seconds that answers under way have to end, after Ctrl-C or SIGTERM.", min=0)
    ] = 10.0,
) -> None:
    """Serve the routed model by OpenAI's API: chat completions, completions, models, metrics, and a page.

    [dim]spectr serve --policy keys.yaml --host 0.0.0.0[/]
    [dim]spectr serve --engine vllm -- --max-model-len 2048 --tensor-parallel-size 2[/]
    """
    if engine not in _ENGINES:
        raise SpectrError(f"--engine {engine}", expected=" or ".join(_ENGINES))
    if engine == "vllm":
        _check_vllm()
        routing = routing.for_tokens()
    elif options:
        raise SpectrError(f"{' '.join(options)}: the engine transformers has no options of its own", do="leave it out")
    settings = _settings(routing, exclude, host, port, policy, served_name, record, grace)
    if engine == "vllm":
        _launch_vllm(dataclasses.replace(settings, options=tuple(options or ())))
        return
    from spectr.serving.engines.batching import Batching

    _serve_transformers(routing, settings, Batching(cache_tokens=cache_tokens) if batch else None)


def _settings(
    routing: Routing,
    exclude: list[str] | None,
    host: str,
    port: int,
    policy: Path | None,
    served: str,
    record: bool,
    grace: float,
) -> Settings:
    from spectr.models import HUB_ID
    from spectr.serving.settings import Settings, base_name

    library, router = routing.experts()
    library.check(*(exclude or []))
    experts = tuple(name for name in sorted(routing.allow or library) if name not in (exclude or []))
    if not experts:
        raise LibraryError("--except leaves no expert to serve", do="name fewer")
    settings = Settings(
        library=library,
        experts=experts,
        router=router,
        router_name=routing.router_name(library),
        model=routing.model,
        base_name=base_name(routing.model, HUB_ID),
        dtype=routing.dtype,
        served=served,
        policy_file=policy,
        host=host,
        port=port,
        count=record,
        grace=grace,
    )
    settings.check()
    return settings


def _check_router(router: Router) -> None:
    """Raise :class:`SpectrError` for a router that cannot be steered; composing would say so, but minutes later."""
    from spectr.routers import Shortlist
    from spectr.routers.base import ShortlistRouter

    if isinstance(router, (Shortlist, ShortlistRouter)):
        raise SpectrError(
            f"{router} makes a shortlist before it looks at a request's own experts, and cannot be served",
            expected="a router that scores all experts, such as calibrated or spectr",
            do="choose another with --router",
        )


def _check_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("--engine vllm", "vllm")


def _launch_vllm(settings: Settings) -> None:
    try:
        from spectr.serving.engines.vllm import launch
    except ImportError as error:
        raise MissingExtraError("--engine vllm", "vllm") from error
    launch(settings, say)


def _serve_transformers(routing: Routing, settings: Settings, batching: Batching | None) -> None:
    try:
        from spectr.serving.engines.transformers import TransformersEngine, check_version
        from spectr.serving.run import listen
    except ImportError as error:
        raise MissingExtraError("spectr serve", "serve") from error
    from spectr.serving.suspicion import suspicious

    check_version()
    _check_router(settings.router)
    bound = settings.listen()
    base, tokenizer = routing.base()
    narrowed = dataclasses.replace(routing, allow=list(settings.experts))
    routed = narrowed.compose(base, tokenizer, settings.library, settings.router)
    engine = TransformersEngine(
        routed,
        tokenizer,
        base_model=settings.base_name,
        router=settings.router_name,
        suspicion=suspicious(settings.library[name] for name in routed.experts),
        batching=batching,
    )
    try:
        asyncio.run(listen(engine.app, engine, settings, bound, say))
    finally:
        engine.close()
        bound.close()
