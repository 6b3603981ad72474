"""``spectr compose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectr.cli.console import bar, out
from spectr.cli.options import Routing, with_options
from spectr.errors import MissingExtraError


@with_options
def compose(
    routing: Routing,
    save: Annotated[Path, typer.Option("--save", "-s", help="Write the composed model to this folder.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder's content.")] = False,
    access: Annotated[
        str,
        typer.Option(
            help="Choose what a vLLM request that names no experts gets: all of them (open) or the base model (closed)."
        ),
    ] = "open",
    record: Annotated[bool, typer.Option("--record", help="Let vLLM requests ask for the chosen experts.")] = False,
) -> None:
    """Write base model, experts and router as one folder that transformers and vLLM load.

    Without --router, the router decides for each token, as vLLM requires: calibrated-token if the library is
    calibrated, else spectr.

    [dim]spectr compose --save runs/composed[/]
    [dim]python -m vllm.entrypoints.openai.api_server --model runs/composed[/]
    """
    try:
        from spectr.composed_model.save import check_folder, check_saving, save_composed
    except ImportError as error:
        raise MissingExtraError("spectr compose", "models") from error
    check_folder(save, overwrite)  # before anything about the router is printed
    library, router = routing.experts(token_level=True)
    experts = routing.allow or library.names
    check_saving(router, experts, save, access=access, record=record, overwrite=overwrite)  # before the slow part
    base, tokenizer = routing.base()
    routed = routing.compose(base, tokenizer, library, router)

    with bar() as advance:
        save_composed(
            routed,
            tokenizer,
            save,
            access=access,
            record=record,
            overwrite=overwrite,
            progress=lambda phase, done, total: advance(phase, done, total, ""),
        )
    out.print(f"{save}: {len(routed.experts)} experts, {len(routed.layers)} routed layers, {router}", highlight=False)
