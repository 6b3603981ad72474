"""``spectr benchmark``."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from spectr.cli.console import bar, out, say
from spectr.cli.options import JsonOption, Routing, check_target, with_options
from spectr.errors import SpectrError
from spectr.folders import with_parents

if TYPE_CHECKING:
    from spectr.benchmark import Outcome


@with_options
def benchmark(
    routing: Routing,
    experts: Annotated[
        int | None,
        typer.Option(help="Measure with N experts: the library's, plus synthetic ones of the same sizes.", min=1),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare with peft-single, peft-arrow, both (separated by a comma), or none. Default: both, if PEFT's "
            "Arrow can hold the experts.",
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Set the number of prompt tokens.", min=1)] = 256,
    batch: Annotated[str, typer.Option(help="Set the batch size for decoding, or several: 1,16.")] = "1,16",
    steps: Annotated[int, typer.Option(help="Decode this many tokens per round.", min=1)] = 16,
    rounds: Annotated[
        int, typer.Option(help="Set the number of rounds. Each round times every model once.", min=1)
    ] = 7,
    explain: Annotated[bool, typer.Option("--explain", help="Print which kernels serve the layers, and why.")] = False,
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Write all numbers to this .json file too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time the routed model, the base model and PEFT in turn, with your own model and library.

    [dim]spectr benchmark[/]
    [dim]spectr benchmark --experts 64 -r spectr --dtype bfloat16[/]
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from spectr.benchmark.comparison import Plan, fitting_peers, read_batches, read_peers, run_plan

    check_target(file, ".json")
    peers, batches = read_peers(against), read_batches(batch)
    library, router = routing.experts()
    if routing.allow:
        raise SpectrError("spectr benchmark ignores --allow", do="use a library that holds only these experts")
    if against is None and (fitting := fitting_peers(peers, library)) != peers:
        say("PEFT's Arrow is not measured: it cannot hold experts that differ in rank or modules")
        peers = fitting
    sizes = {"experts": experts, "prompt": prompt, "batches": batches, "steps": steps, "rounds": rounds}
    plan = Plan(library=library, router=router, peers=peers, **sizes)
    model, _ = routing.base(plan.check_base)
    with bar() as advance:
        outcome = run_plan(plan, model, advance)
    text = json.dumps(dataclasses.asdict(outcome), indent=2)
    if file:
        with_parents(file).write_text(text + "\n", encoding="utf-8")
        say(f"wrote {file}")
    if as_json:
        out.print(text, highlight=False, markup=False)
    else:
        _show(outcome, rounds, explain=explain)


def _show(outcome: Outcome, rounds: int, *, explain: bool) -> None:
    from spectr.benchmark.comparison import COLUMNS

    table = Table(*COLUMNS)
    for row in outcome.rows:
        table.add_row(*row)
    out.print(table)
    origin = outcome.origin
    out.print(
        f"{origin['experts']} experts, {origin['router']}, {origin['dtype']}, {origin['threads']} threads, "
        f"kernels {origin['kernels']}, {origin['device']}, torch {origin['torch']}; "
        f"medians of {rounds} rounds. limit: the ratio to the base model if the machine spent time only on the added "
        "operations (prompt) or on reading the added bytes (decoding). memory: the peak of one call.",
        highlight=False,
    )
    for line in outcome.backends if explain else ():
        out.print(line, highlight=False, markup=False)
