"""``spectr serve``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from spectr.cli.console import say
from spectr.cli.options import Routing, with_options
from spectr.errors import page
from spectr.serving.engines.launchers import ENGINES, Parts


@with_options
def serve(
    routing: Routing,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- OPTIONS", help="Pass these options to vLLM, such as -- --max-model-len 2048."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help=f"Serve with {' or '.join(ENGINES.entries)} (if installed), or with another package's engine."
        ),
    ] = "transformers",
    host: Annotated[
        str, typer.Option(help="Listen on this address; without a policy it must be a loopback address.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Listen on this port; 0 takes a free one.", min=0, max=65535)] = 8000,
    policy: Annotated[
        Path | None,
        typer.Option(
            help=f"Read from this YAML or JSON file which experts each API key may use. See {page('howto/serving')}."
        ),
    ] = None,
    served_name: Annotated[str, typer.Option(help="Name the composed model for clients.")] = "spectr",
    exclude: Annotated[list[str] | None, typer.Option("--except", help="Leave out this expert, repeatable.")] = None,
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Count tokens by expert for every request, for /metrics.")
    ] = True,
    batch: Annotated[
        bool,
        typer.Option(
            "--batch/--no-batch", help="Answer many requests at once, with the continuous batching of transformers."
        ),
    ] = False,
    cache_tokens: Annotated[
        int, typer.Option(help="Limit the tokens of all running requests in memory, with --batch.", min=256)
    ] = 16384,
    router: Annotated[
        list[str] | None,
        typer.Option(
            "--router",
            "-r",
            help="Offer this router to requests, repeatable; the first is the default. spectr generate --help lists "
            "them. vllm offers all but glider, lag, oracle and shortlist.",
            show_default="auto",
            rich_help_panel="Routing",
        ),
    ] = None,
    grace: Annotated[
        float, typer.Option(help="Give unfinished answers this many seconds after Ctrl-C or SIGTERM.", min=0)
    ] = 10.0,
) -> None:
    """Serve the routed model with OpenAI's API: chat completions, completions, models, metrics, and a web page.

    [dim]spectr serve --policy keys.yaml --host 0.0.0.0[/]
    [dim]spectr serve --router calibrated --router spectr[/]
    [dim]spectr serve --engine vllm -- --max-model-len 2048 --tensor-parallel-size 2[/]
    """
    from spectr.serving.server_settings import make_settings

    launcher = ENGINES.make(engine)
    launcher.check(options or ())
    settings = make_settings(
        routing.request(router, token_level=launcher.by_token),
        exclude=exclude or (),
        dtype=routing.dtype,
        served_name=served_name,
        policy_file=policy,
        host=host,
        port=port,
        count=record,
        grace=grace,
        options=tuple(options or ()),
    )
    routing.announce(settings.routers.values(), settings.remarks)
    narrowed = dataclasses.replace(routing, allow=list(settings.experts))
    parts = Parts(
        open_model=routing.base,
        compose=lambda model, tokenizer, chosen, what: narrowed.compose(
            model, tokenizer, settings.library, chosen, what=what
        ),
        cache_tokens=cache_tokens if batch else None,
    )
    launcher.launch(settings, parts, say)
