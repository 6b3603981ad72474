"""``spectr benchmark``."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from spectr.cli.console import bar, out, say
from spectr.cli.options import JsonOption, Routing, check_target, with_routing

if TYPE_CHECKING:
    from spectr.routers import Router


@with_routing
def benchmark(
    routing: Routing,
    experts: Annotated[
        int | None,
        typer.Option(help="Measure with so many experts: the library's, and synthetic ones like them.", min=1),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="peft-single, peft-arrow, both with a comma, or none; "
            "by default both, where PEFT's Arrow can hold the experts.",
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 256,
    batch: Annotated[str, typer.Option(help="Rows that are decoded together; several with commas.")] = "1,16",
    steps: Annotated[int, typer.Option(help="Tokens that are decoded in a round.", min=1)] = 16,
    rounds: Annotated[int, typer.Option(help="How often everything is timed, in turn.", min=1)] = 7,
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Write all numbers to this .json file too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time the routed model beside the base model and PEFT, in turn, on your own model and library.

    [dim]spectr benchmark[/]
    [dim]spectr benchmark --experts 64 -r spectr --dtype bfloat16[/]
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from spectr.benchmark.report import COLUMNS
    from spectr.benchmark.report import benchmark as run
    from spectr.benchmark.subjects import PEERS, alike, check_peers, get_peer
    from spectr.benchmark.synthetic import write_lookalikes
    from spectr.errors import SpectrError
    from spectr.models.text import context_length
    from spectr.routers import GuidedRouter

    check_target(file, ".json")
    named = PEERS if against is None else map(str.strip, against.split(","))
    peers = [name for name in named if name not in ("", "none")]
    for name in peers:
        get_peer(name)
    try:
        batches = [int(number) for number in batch.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise SpectrError(f"--batch {batch}", expected="numbers of at least 1, with commas: 1,16")
    library, router = routing.experts()
    if against is None and not alike(library):
        peers.remove("peft-arrow")
        say("PEFT's Arrow is left out: it cannot hold experts that differ in rank or modules")
    check_peers(peers, library)
    if routing.allow:
        raise SpectrError("--allow makes no difference here", do="give a library with these experts")
    if isinstance(router, GuidedRouter):
        raise SpectrError(f"{router} writes text for every prompt", do="time its local router: -r phatgoose")
    if experts and experts > len(library) and _goes_by_measures(router):
        raise SpectrError(
            "synthetic experts have no calibration and no gates", do="-r spectr, -r arrow, -r lag, -r seqr or -r mu"
        )
    model, _ = routing.base()
    context = context_length(model)
    if context is not None and prompt + steps > context:
        raise SpectrError(
            f"--prompt {prompt} and --steps {steps}", expected=f"at most {context} tokens in all, this model's context"
        )
    with tempfile.TemporaryDirectory(prefix="spectr-benchmark-") as folder, bar() as advance:
        if experts and experts != len(library):
            library = write_lookalikes(
                library,
                Path(folder),
                experts,
                progress=lambda done, total: advance("making experts", done, total, ""),
            )
        outcome = run(
            model,
            library,
            router,
            peers=peers,
            prompt=prompt,
            batches=batches,
            steps=steps,
            rounds=rounds,
            progress=lambda done, total, what: advance("timing", done, total, what),
        )
    text = json.dumps(dataclasses.asdict(outcome), indent=2)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")
        say(f"wrote {file}")
    if as_json:
        out.print(text, highlight=False, markup=False)
        return
    table = Table(*COLUMNS)
    for row in outcome.rows:
        table.add_row(*row)
    out.print(table)
    origin = outcome.origin
    out.print(
        f"{origin['experts']} experts, {origin['router']}, {origin['dtype']}, {origin['threads']} threads, "
        f"kernels {origin['kernels']}, {origin['device']}, torch {origin['torch']}; "
        f"medians of {rounds} rounds in turn. limit: over the base if the machine did nothing but the added "
        "operations (prompt), or read the added bytes (decoding). memory: most that "
        "one call held at once.",
        highlight=False,
    )


def _goes_by_measures(router: Router) -> bool:
    """Whether a router needs what was measured or trained of each expert."""
    from spectr.library.needs import SIDE_DATA, Indexed

    return any(need in SIDE_DATA or isinstance(need, Indexed) for need in router.needs)
