"""``spectr merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from spectr.cli.console import bar, out, say
from spectr.cli.model_loading import open_model
from spectr.cli.options import BaseOption, LibraryOption, known_dtype
from spectr.errors import MergeError, SpectrError, collecting
from spectr.folders import check_new_folder
from spectr.shipped import open_library

if TYPE_CHECKING:
    from spectr.library import ExpertLibrary
    from spectr.merging import Recipe

_PANEL = "Settings of a method (docs/merging.md has their defaults)"


def merge(
    experts: Annotated[list[str], typer.Argument(help="Experts of the library, in the order of the weights.")],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder for the result; made, or empty.")],
    library: LibraryOption = None,
    method: Annotated[
        str, typer.Option("--method", help="average, linear, ties, dare, dare-ties, knots or genknowsub.")
    ] = "ties",
    weights: Annotated[str | None, typer.Option(help='One number for each expert: "1,0.5".')] = None,
    subtract: Annotated[
        str | None,
        typer.Option(help="General expert (or several, with commas: their mean) to subtract from each expert first."),
    ] = None,
    strength: Annotated[float | None, typer.Option(help="How much of it to subtract; 1.0 by default.")] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank of the adapter.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of the merge to keep, from 0 to 1: the smallest ranks that do.")
    ] = None,
    into_base: Annotated[
        bool, typer.Option("--into-base", help="Write a whole model with the merge in its weights, not an adapter.")
    ] = False,
    model: BaseOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of --into-base: float32 (the default), bfloat16, float16 or auto.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the entries that stay.", rich_help_panel=_PANEL)
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Of the merged update.", rich_help_panel=_PANEL)] = None,
    seed: Annotated[int | None, typer.Option(help="Of DARE's random masks.", rich_help_panel=_PANEL)] = None,
    inner: Annotated[
        str | None, typer.Option(help="What knots merges with: ties or average.", rich_help_panel=_PANEL)
    ] = None,
) -> None:
    """Merge LoRA experts into one adapter, or into the base model.

    No data, no training and, for an adapter, no model: the experts' files are all it reads. The adapter is an ordinary
    one of PEFT's; modules keep the ranks that they need.

    [dim]spectr merge agnews sst2 --method ties --weights 1,0.5 --rank 16 --out runs/merged[/]
    [dim]spectr merge agnews sst2 --method knots --into-base --out runs/model[/]
    [dim]spectr merge agnews --method genknowsub --subtract sst2 --out runs/agnews-only[/]
    """
    options = {"density": density, "scale": scale, "seed": seed, "inner": inner}
    chosen, recipe = _checked(
        library,
        out_folder,
        experts=_names(experts),
        method=method,
        options={key: value for key, value in options.items() if value is not None},
        weights=weights,
        subtract=_names([subtract] if subtract else []),
        strength=1.0 if strength is None else strength,
        size=(rank, energy, into_base),
        idle=_idle({"--model": model, "--dtype": dtype}, "--into-base", into_base)
        + _idle({"--strength": strength}, "--subtract", bool(subtract)),
    )
    if into_base:
        _into_base(chosen, recipe, out_folder, model, known_dtype(dtype or "float32"))
    else:
        _into_adapter(chosen, recipe, out_folder, rank, energy)


def _checked(
    path: Path | None,
    out_folder: Path,
    *,
    weights: str | None,
    size: tuple[int | None, float | None, bool],
    idle: list[SpectrError],
    **request: Any,
) -> tuple[ExpertLibrary, Recipe]:
    """Library and recipe, with everything told that is wrong with the request before anything is read or written."""
    from spectr.merging import make_recipe
    from spectr.merging.merge import size_faults

    rank, energy, into_base = size
    problems: list[SpectrError] = [*size_faults(rank, energy), *idle]
    if into_base and (rank is not None or energy is not None):
        problems.append(MergeError("--into-base has no rank to limit", do="leave out --rank and --energy"))
    chosen, numbers = None, None
    with collecting(problems):
        check_new_folder(out_folder, MergeError)
    with collecting(problems):
        chosen = open_library(path)
    with collecting(problems):
        numbers = _numbers(weights)
    recipe = make_recipe(chosen, weights=numbers, problems=problems, **request)
    assert chosen is not None
    return chosen, recipe


def _idle(given: dict[str, Any], of: str, used: bool) -> list[SpectrError]:
    """Options that make no difference without another one."""
    wrong = [option for option, value in given.items() if value is not None and not used]
    return [
        MergeError(f"{option} makes no difference without {of}", do=f"leave it out, or add {of}") for option in wrong
    ]


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
    say(f"to route with it: spectr library add {out_folder.name} {out_folder} --library DIR")


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
    table.add_row("change of a weight", *_spread(merged.change, "{:.2%}"))
    table.add_row("energy kept", *["100.0%"] * 3)
    out.print(table)
    out.print(f"model: {out_folder.resolve()}", highlight=False)


def _title(recipe: Recipe, modules: int) -> str:
    return f"{recipe.method.name} of {', '.join(recipe.experts)}: {modules} modules"


def _spread(values: Any, form: str) -> list[str]:
    from spectr.merging.merge import spread

    return [form.format(value) for value in spread(values)]


def _names(texts: list[str]) -> list[str]:
    """Experts that were given one by one, or several with commas."""
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise MergeError(f"--weights {text}", expected='numbers with commas between them: "1,0.5"') from None
