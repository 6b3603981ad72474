"""Options that commands share, and what they stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectr.cli.console import bar, say
from spectr.errors import MissingExtraError, SpectrError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spectr.composition import Routed
    from spectr.library import ExpertLibrary
    from spectr.routers import Router

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or Hub id of the base model; the default is SmolLM2-135M-Instruct."),
]
LibraryOption = Annotated[
    Path | None,
    typer.Option("--library", "-l", help="Folder of experts; the default is the shipped ones."),
]
RouterOption = Annotated[
    str,
    typer.Option(
        "--router",
        "-r",
        help="spectr, spectr-paper, spectr-softmax, spectr-projection, spectr-code, arrow, mu, oracle, or one that a "
        "package added.",
    ),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", "-k", help="Experts for each token and layer; the default is 4.", min=1)
]
ExpertOption = Annotated[str | None, typer.Option("--expert", "-e", help="The oracle's expert.")]
RouterTemperatureOption = Annotated[
    float | None, typer.Option("--router-temperature", help="Temperature of the softmax over scores.")
]
CombineOption = Annotated[str | None, typer.Option("--combine", help="outputs or factors.")]
AllowOption = Annotated[
    list[str] | None, typer.Option("--allow", "-a", help="Only these experts may be chosen; give it once for each.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def make_router(name: str, library: ExpertLibrary, **options: Any) -> Router:
    """The router of that name with the options that were given, checked against the library.

    Without ``top_k`` it takes at most as many experts as there are.
    """
    from spectr.routers import get_router

    router = get_router(name, **{key: value for key, value in options.items() if value is not None})
    if options.get("top_k") is None and getattr(router, "top_k", 0) > len(library):
        router = dataclasses.replace(router, top_k=len(library))  # pyright: ignore[reportArgumentType]
    router.resident(library.names)
    return router


def open_library(path: Path | None) -> ExpertLibrary:
    """The library at that path, or the shipped one."""
    from spectr.library import ExpertLibrary
    from spectr.shipped import shipped_experts

    return ExpertLibrary.open(path or shipped_experts())


def open_model(name: str | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model and its tokenizer, with a word on what happens."""
    try:
        from transformers.utils import logging

        from spectr.models import DEFAULT_MODEL, fetch_default_model, load_model
    except MissingExtraError:
        raise
    except ImportError as error:
        raise MissingExtraError("running a model", "models") from error
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise SpectrError(f"--dtype {dtype}", expected="auto, float32, bfloat16 or float16")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name in (None, DEFAULT_MODEL):
        fetch_default_model(say)
    say(f"loading {name or 'SmolLM2-135M-Instruct'}")
    return load_model(name, dtype=dtype)  # pyright: ignore[reportArgumentType]


def open_routed(
    model: PreTrainedModel, library: ExpertLibrary, router: Router, allow: list[str] | None = None
) -> Routed:
    """The model composed with the library, with a progress bar."""
    from spectr.composition import compose

    with bar() as advance:
        routed = compose(
            model, library, router, progress=lambda done, total: advance("preparing layers", done, total, "")
        )
        if allow:
            routed.allow(allow)
    return routed
