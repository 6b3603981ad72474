"""``spectr extract`` and ``spectr rerank``: experts from other weights."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from spectr.cli.console import bar, out, say
from spectr.cli.options import LibraryOption, check_target
from spectr.errors import MissingExtraError
from spectr.shipped import open_library

if TYPE_CHECKING:
    from spectr.adapters import Expert
    from spectr.extraction import Report

Out = Annotated[Path, typer.Option("--out", "-o", help="Write the expert to this folder, which must be new or empty.")]
Rank = Annotated[int | None, typer.Option(help="Set the rank of every module.")]
Energy = Annotated[
    float | None,
    typer.Option(help="Use the smallest ranks that keep this share of each module's squared norm, instead of --rank."),
]
MaxRank = Annotated[int, typer.Option(help="Limit the rank of a module, with --energy.")]
Name = Annotated[str | None, typer.Option(help="Name the expert; by default like the folder.")]
Written = Annotated[str, typer.Option("--dtype", help="Write the expert's weights as bfloat16 or float32.")]
Png = Annotated[Path | None, typer.Option(help="Draw the share that is kept, by block and kind of layer, as PNG.")]
Svg = Annotated[Path | None, typer.Option(help="Draw the same picture as SVG.")]

_LEFT_SHOWN = 5


def extract(
    fine_tuned: Annotated[str, typer.Argument(help="Read this fine-tuned model: a folder (safetensors) or a Hub id.")],
    out_folder: Out,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", "-b", help="Read this base model, which it was fine-tuned from; by default SmolLM2-135M-Instruct."
        ),
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    max_rank: MaxRank = 128,
    method: Annotated[
        str, typer.Option(help="Choose the SVD: exact, randomised, or auto (exact if it fits and is fast).")
    ] = "auto",
    oversampling: Annotated[int, typer.Option(help="Add this many extra directions in the randomised SVD.")] = 10,
    power_iterations: Annotated[int, typer.Option(help="Refine the randomised SVD by this many passes.")] = 2,
    seed: Annotated[int, typer.Option(help="Set the seed of the randomised SVD.")] = 0,
    max_memory: Annotated[float, typer.Option(help="Limit the memory of tensors, in GiB.")] = 4.0,
    dtype: Written = "bfloat16",
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop with an error if anything changed that LoRA cannot hold.")
    ] = False,
    called_only: Annotated[
        bool,
        typer.Option(
            "--called-only",
            help="Leave out layers whose weights the model uses without calling them (Mamba's dt_proj).",
        ),
    ] = False,
    name: Name = None,
    png: Png = None,
    svg: Svg = None,
) -> None:
    """Extract a LoRA expert from a fully fine-tuned model and its base, without training.

    The expert holds the first singular directions of each linear layer's change. Both models are read piece by piece
    and are never loaded as a whole.

    [dim]spectr extract ./fine-tuned --base ./base --rank 16 --out runs/expert --png energy.png[/]
    """
    from spectr.extraction import Extraction, extract as run

    settings = Extraction(
        rank=rank,
        energy=energy,
        max_rank=max_rank,
        method=method,  # pyright: ignore[reportArgumentType]
        oversampling=oversampling,
        power_iterations=power_iterations,
        seed=seed,
        max_memory=int(max_memory * (1 << 30)),
        dtype=dtype,
        strict=strict,
        called_only=called_only,
    )
    pictures = _pictures(png, svg)
    folder, base_model = _base(base)
    with bar() as advance:
        report = run(fine_tuned, folder, out_folder, settings, name=name, base_model=base_model, progress=advance)
    _show(report, out_folder, pictures)


def rerank(
    expert: Annotated[
        str, typer.Argument(help="Read this expert: a name in the library, an adapter's folder, or a Hub id.")
    ],
    out_folder: Out,
    library: LibraryOption = None,
    rank: Rank = None,
    energy: Energy = None,
    max_rank: MaxRank = 128,
    dtype: Written = "bfloat16",
    name: Name = None,
    png: Png = None,
    svg: Svg = None,
) -> None:
    """Lower an expert's rank: the closest expert of that rank, computed exactly from its factors.

    [dim]spectr rerank sst2 --rank 4 --out runs/small[/]
    """
    from spectr.extraction import Truncation, rerank as run

    truncation = Truncation(rank=rank, energy=energy, max_rank=max_rank)
    pictures = _pictures(png, svg)
    found = _expert(expert, library)
    with bar() as advance:
        report = run(found, out_folder, truncation, dtype=dtype, name=name, progress=advance)
    _show(report, out_folder, pictures)


def _base(base: str | None) -> tuple[str | Path, str]:
    """Where the base model is, and its name in the expert's configuration."""
    try:
        from spectr.models import HUB_ID, fetch_default_model
    except ImportError as error:
        raise MissingExtraError("extracting experts", "models") from error
    return (fetch_default_model(say), HUB_ID) if base in (None, HUB_ID) else (base, base)


def _expert(name: str, library: Path | None) -> Expert:
    from spectr.adapters import read_adapter

    if library is None and ("/" in name or Path(name).is_dir()):
        return read_adapter(name, Path(name).name)
    return open_library(library)[name]


def _pictures(png: Path | None, svg: Path | None) -> list[Path]:
    """The pictures to draw; checks before the slow part that they can be drawn."""
    check_target(png, ".png")
    check_target(svg, ".svg")
    wanted = [path for path in (png, svg) if path]
    if wanted:
        import_module("spectr.plots.energy")
    return wanted


def _show(report: Report, folder: Path, pictures: list[Path]) -> None:
    out.print(_table(report))
    for remark in report.remarks:
        say(remark)
    if report.left:
        say(_left(report))
    for path in pictures:
        from spectr.plots import write_energy_map

        out.print(f"picture: {write_energy_map(report, path).resolve()}", highlight=False)
    out.print(
        f"{report.share:.2%} of the squared norm kept in {len(report.modules)} modules; expert: {folder.resolve()}",
        highlight=False,
    )


def _table(report: Report) -> Table:
    from spectr.extraction import summary
    from spectr.extraction.outcome import percent, whole

    rows = summary(report)
    known = any(row.relative for row in rows)
    table = Table("modules", "number", "kept, % (least / median / most)", "rank (least / median / most)")
    if known:
        table.add_column("change / weight (median)")
    for kind, count, share, rank, relative in rows:
        change = [f"{relative.median:.1e}" if relative else ""] if known else []
        table.add_row(kind, str(count), percent(share), whole(rank), *change)
    return table


def _left(report: Report) -> str:
    shown = sorted(report.left, key=lambda one: -one.change)[:_LEFT_SHOWN]
    named = [
        f"{one.name} ({one.kind}{'' if one.relative is None else f', change / size {one.relative:.1e}'})"
        for one in shown
    ]
    rest = f" and {len(report.left) - len(shown)} more (see the card)" if len(report.left) > len(shown) else ""
    return (
        f"not in the expert, since LoRA cannot hold it: {', '.join(named)}{rest}; {report.left_share:.2%} of the "
        "squared norm of all changes"
    )
