"""``spectr merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from spectr.cli.console import bar, out, say
from spectr.cli.model_loading import open_model
from spectr.cli.options import BaseOption, LibraryOption, known_dtype, split_names
from spectr.merging.method import METHODS

if TYPE_CHECKING:
    from spectr.library import ExpertLibrary
    from spectr.merging import Recipe

_PANEL = "Settings of a method (defaults: see the documentation of merging)"


def merge(
    experts: Annotated[list[str], typer.Argument(help="Merge these experts, in the order of the weights.")],
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", help="Write the result to this folder, which must be new or empty.")
    ],
    library: LibraryOption = None,
    method: Annotated[
        str, typer.Option("--method", help=f"Merge by {', '.join(METHODS.entries)}, or a method from another package.")
    ] = "ties",
    weights: Annotated[str | None, typer.Option(help='Weight the experts by these numbers: "1,0.5".')] = None,
    subtract: Annotated[
        str | None,
        typer.Option(
            help="Subtract this general expert from each expert, or the mean of several, separated by commas."
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Multiply the update of --subtract by this number; 1.0 by default.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Limit the adapter's ranks.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Use the smallest ranks that keep this share of the merge, from 0 to 1."),
    ] = None,
    into_base: Annotated[
        bool, typer.Option("--into-base", help="Write a whole model that contains the merge, not an adapter.")
    ] = False,
    model: BaseOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Set the precision of --into-base; float32 by default.", callback=known_dtype),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Keep this share of the entries.", rich_help_panel=_PANEL)
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Multiply the merged update by this number.", rich_help_panel=_PANEL)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Set the seed of DARE's random masks.", rich_help_panel=_PANEL)
    ] = None,
    inner: Annotated[
        str | None, typer.Option(help="Choose the merge inside knots: ties or average.", rich_help_panel=_PANEL)
    ] = None,
) -> None:
    """Merge LoRA experts into one adapter, or into the base model.

    Needs no data and no training. An adapter is made from the experts' files alone, without the model. The result is an
    ordinary PEFT adapter; each module has the rank that it needs.

    [dim]spectr merge agnews sst2 --method ties --weights 1,0.5 --rank 16 --out runs/merged[/]
    [dim]spectr merge agnews sst2 --method knots --into-base --out runs/model[/]
    [dim]spectr merge agnews --method products --subtract sst2 --out runs/agnews-only[/]
    """
    from spectr.merging.recipe import read_plan

    options = {"density": density, "scale": scale, "seed": seed, "inner": inner}
    opened, recipe = read_plan(
        library,
        split_names(experts),
        out_folder,
        method=method,
        options={key: value for key, value in options.items() if value is not None},
        weights=weights,
        subtract=split_names([subtract] if subtract else []),
        strength=strength,
        rank=rank,
        energy=energy,
        into_base=into_base,
        model=model,
        dtype=dtype,
    )
    if into_base:
        _into_base(opened, recipe, out_folder, model, dtype or "float32")
    else:
        _into_adapter(opened, recipe, out_folder, rank, energy)


def _into_adapter(
    library: ExpertLibrary, recipe: Recipe, out_folder: Path, rank: int | None, energy: float | None
) -> None:
    from spectr.merging import merge_adapter, save_merged_adapter

    with bar() as advance:
        merged = merge_adapter(
            library,
            recipe,
            rank=rank,
            energy=energy,
            progress=lambda done, total: advance("merging modules", done, total, ""),
        )
    save_merged_adapter(merged, library, out_folder)
    ranks = {module: float(delta.rank) for module, delta in merged.deltas.items()}
    parameters = sum(delta.A.numel() + delta.B.numel() for delta in merged.deltas.values())
    table = Table("adapter", "smallest", "median", "largest", title=_title(recipe, len(ranks)))
    table.add_row("rank", *_spread(ranks, "{:.0f}"))
    table.add_row("energy kept", *_spread(merged.energy, "{:.1%}"))
    out.print(table)
    out.print(f"adapter of {parameters:,} parameters: {out_folder.resolve()}", highlight=False)
    say(f"to route with it, run: spectr library add {out_folder.name} {out_folder} --library DIR")


def _into_base(library: ExpertLibrary, recipe: Recipe, out_folder: Path, model: str | None, dtype: str) -> None:
    base, tokenizer = open_model(model, dtype)

    from spectr.merging import merge_into, save_merged_model
    from spectr.models import DEFAULT_MODEL, HUB_ID

    with bar() as advance:
        merged = merge_into(
            base,
            library,
            recipe,
            undoable=False,
            progress=lambda done, total: advance("merging modules", done, total, ""),
        )
    say("writing the model")
    name = HUB_ID if model in (None, DEFAULT_MODEL, HUB_ID) else model
    save_merged_model(base, tokenizer, merged, library, out_folder, base_model=name)
    table = Table("model", "smallest", "median", "largest", title=_title(recipe, len(merged.change)))
    table.add_row("change of the weights", *_spread(merged.change, "{:.2%}"))
    table.add_row("energy kept", *["100.0%"] * 3)
    out.print(table)
    out.print(f"model: {out_folder.resolve()}", highlight=False)


def _title(recipe: Recipe, modules: int) -> str:
    return f"{recipe.method.name} of {', '.join(recipe.experts)}: {modules} modules"


def _spread(values: Any, form: str) -> list[str]:
    from spectr.merging.merge import spread

    return [form.format(value) for value in spread(values)]
