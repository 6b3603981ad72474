"""``spectr library describe``: describe experts in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectr.cli.console import bar, out, say
from spectr.cli.model_loading import check_writer, open_writer
from spectr.cli.options import BaseOption, DtypeOption, Rows, with_options
from spectr.errors import DataError


@with_options
def describe(
    rows: Rows,
    library: Annotated[
        Path, typer.Option("--library", "-l", help="Write descriptions.yaml to this folder of experts.")
    ],
    names: Annotated[
        list[str] | None, typer.Argument(help="Describe these experts; by default all without a description.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Use this text as the description of one expert.")] = None,
    examples: Annotated[int, typer.Option(help="Show the writer this many rows.", min=1)] = 3,
    writer: Annotated[
        str | None,
        typer.Option(
            help="Write with this model, or http(s)://host/v1#MODEL; by default the model of --model.",
            callback=check_writer,
        ),
    ] = None,
    model: BaseOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Describe experts in words, for the router "glider". A language model reads a few rows of each expert's data.

    The texts are in descriptions.yaml. Read and correct them: a small model writes poor descriptions.

    [dim]spectr library describe --library my-experts --data-root data --writer http://localhost:8000/v1#my-model[/]
    [dim]spectr library describe sql --library my-experts --text "Turn a question into an SQL query."[/]
    """
    from spectr.description import read_description_plan, run_description_plan

    if writer == "none":
        raise DataError("--writer none writes nothing", do="name a model or an endpoint, or pass --text")
    plan = read_description_plan(library, names or (), rows.source(), text=text, limit=examples)
    if not (plan.rows or plan.text):
        out.print("all of these experts have a description; to describe some again, name them")
        return
    with bar() as advance:
        path, found = run_description_plan(plan, lambda: open_writer(writer or model, dtype), advance)
    for name, words in found.items():
        out.print(f"{name}: {words}", highlight=False, markup=False)
    say(f"wrote {path}; correct the texts there")
