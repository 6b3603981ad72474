"""``spectr serve``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectr.cli.console import say
from spectr.cli.options import Routing, routers_of, with_routing
from spectr.errors import LibraryError, SpectrError

if TYPE_CHECKING:
    from spectr.serving.settings import Settings


@with_routing
def serve(
    routing: Routing,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- OPTIONS", help="vllm: options of its own, such as -- --max-model-len 2048."),
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
    router: Annotated[
        list[str] | None,
        typer.Option(
            "--router",
            "-r",
            help="A router that requests may name, once for each; the first is the default. auto, or one of those that "
            "spectr generate --help names. vllm: all but glider, lag and shortlist.",
            show_default="auto",
            rich_help_panel="Routing",
        ),
    ] = None,
    grace: Annotated[
        float, typer.Option(help="Seconds that answers under way have to end, after Ctrl-C or SIGTERM.", min=0)
    ] = 10.0,
) -> None:
    """Serve the routed model by OpenAI's API: chat completions, completions, models, metrics, and a page.

    [dim]spectr serve --policy keys.yaml --host 0.0.0.0[/]
    [dim]spectr serve --router calibrated --router spectr[/]
    [dim]spectr serve --engine vllm -- --max-model-len 2048 --tensor-parallel-size 2[/]
    """
    from spectr.serving.engines.launchers import ENGINES, Parts

    launcher = ENGINES.make(engine)
    routings = [dataclasses.replace(routing, router=name) for name in router or ["auto"]]
    if len(routings) > 1 and (routing.expert or "oracle" in (router or ())):
        raise SpectrError(
            "the router oracle, for which --expert is, holds one expert alone and is not served beside others",
            do=f"leave them out; a request asks for one expert alone by its model, {served_name}/EXPERT",
        )
    launcher.check(options or ())
    routings = [one.for_tokens() for one in routings] if launcher.by_token else routings
    for name in router or ():
        if "," in name:
            raise SpectrError(f"--router {name}", do=f"give each its own: --router {name.replace(',', ' --router ')}")
    settings = _settings(routings, exclude, host, port, policy, served_name, record, grace)
    settings = dataclasses.replace(settings, options=tuple(options or ()))
    narrowed = dataclasses.replace(routing, allow=list(settings.experts))
    parts = Parts(
        open_model=routing.base,
        compose=lambda model, tokenizer, chosen, what: narrowed.compose(
            model, tokenizer, settings.library, chosen, what=what
        ),
        cache_tokens=cache_tokens if batch else None,
    )
    launcher.launch(settings, parts, say)


def _settings(
    routings: Sequence[Routing],
    exclude: list[str] | None,
    host: str,
    port: int,
    policy: Path | None,
    served: str,
    record: bool,
    grace: float,
) -> Settings:
    from spectr.composition.several import check_alike
    from spectr.models import HUB_ID
    from spectr.routers import residents
    from spectr.serving.settings import Settings, base_name

    library, routers = routers_of(routings)
    check_alike({name: residents(router, library.names) for name, router in routers.items()})
    routing = routings[0]
    library.check(*(exclude or []))
    experts = tuple(name for name in sorted(routing.allow or library) if name not in (exclude or []))
    if not experts:
        raise LibraryError("--except leaves no expert to serve", do="name fewer")
    settings = Settings(
        library=library,
        experts=experts,
        routers=routers,
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
