"""What routing costs compared with PEFT and with torch alone, on SmolLM2-135M: one table with the aims and the limit.

    $ python benchmarks/speed.py --work WORK

Each setting (experts and dtype) is measured as by ``spectr benchmark``: base model, routed model, PEFT with one adapter
and PEFT's Arrow take turns, and ratios are medians of those within a round. Prompts and decoding have a process each:
what a process did before determines how fast it gets memory, and Arrow's prompts need much. Finished settings are kept
in WORK, so that an interrupted run resumes; ``--fresh`` measures all again. Libraries of 1,000 experts and more,
for which there is the shortlist, have a table of their own: ``benchmarks/scale.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "6")

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from spectr import ExpertLibrary, Spectr
from spectr.benchmark import Timing, benchmark, write_lookalikes
from spectr.benchmark.subjects import BASE, BY_TORCH, OURS
from spectr.models import load_model
from spectr.shipped import shipped_experts

SHIPPED = 9
PARTS = ("prompt", "decoding")
COLUMNS = (
    "experts, dtype",
    "work",
    "ours over one adapter of PEFT",
    "PEFT's Arrow over ours",
    "ours over ours by torch alone",
    "memory, ours over one adapter",
    "ours over base",
    "limit",
)


class Setting(NamedTuple):
    """What a process measures."""

    experts: int
    dtype: Literal["float32", "bfloat16"]
    part: str


class Aims(NamedTuple):
    """What ratios should be: at most, at least, at most."""

    single_prompt: float
    single_token: float
    single_batch: float
    arrow_prompt: float
    arrow_decoding: float
    memory: float


AIMS = {SHIPPED: Aims(1.05, 0.8, 1.05, 2.2, 2.2, 1.2), 64: Aims(1.5, 1.5, 1.5, 15, 6, 1.5)}
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "bfloat16 by AVX-512", "avx512f": "AVX-512", "avx2": "AVX2"}
BUSY = 0.15  # cores that other processes use, from which a machine is loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for synthetic experts and finished settings")
    parser.add_argument("--experts", type=int, nargs="+", default=[SHIPPED, 64])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="measure again what is in WORK")
    given = parser.parse_args()
    if min(given.experts) < SHIPPED or given.rounds < 1:
        parser.error(f"--experts from {SHIPPED} on, and one round at least")
    given.work.mkdir(parents=True, exist_ok=True)
    console, table = Console(width=160), Table(*COLUMNS)
    origin: Mapping[str, Any] = {}
    others: list[float | None] = []
    with Progress(console=console, transient=True) as bars:
        for count in given.experts:
            for dtype in given.dtype:
                name = f"{count}, {dtype}"
                for part in PARTS:
                    task = bars.add_task(f"{count} experts, {dtype}, {part}", total=None)
                    told = outcome(given, Setting(count, dtype, part), partial(_show, bars, task))
                    bars.remove_task(task)
                    for row in rows(told, name, AIMS.get(count)):
                        table.add_row(*row)
                        name = ""
                    origin = told["origin"]
                    others.append(told.get("others"))
    console.print(table)
    console.print(f"{processor()}; {load(others)}.", highlight=False)
    console.print(
        f"{origin['router']}, {origin['threads']} threads, {origin['device']}, torch {origin['torch']}; medians of "
        f"{given.rounds} rounds in turn; in brackets what is aimed at, * where it is missed. limit: over the base "
        "if a machine did nothing but the added operations (prompt), or read the added bytes (decoding). memory: most "
        "that one call held at once, as torch counts.",
        highlight=False,
    )


def _show(bars: Progress, task: TaskID, done: int, total: int, what: str) -> None:
    bars.update(task, completed=done, total=total)


def outcome(given: argparse.Namespace, setting: Setting, progress: Callable[[int, int, str], None]) -> dict[str, Any]:
    """What :func:`spectr.benchmark.benchmark` gives in a process of its own, or gave."""
    kept = given.work / f"{setting.experts}-{setting.dtype}-{setting.part}-{given.rounds}-torch.json"
    if not kept.is_file() or given.fresh:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=measured, args=(given.work, setting, given.rounds, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            while isinstance(told := ours.recv(), tuple):
                progress(*told)
        except EOFError:
            process.join()
            raise SystemExit(f"{setting}: its process ended with {process.exitcode}") from None
        except KeyboardInterrupt:
            raise SystemExit(f"stopped; what is done is in {given.work}") from None
        process.join()
        half = kept.with_suffix(".half")
        half.write_text(json.dumps(told), encoding="utf-8")
        half.replace(kept)  # whole or not at all, whenever a run is killed
    return json.loads(kept.read_text(encoding="utf-8"))


def measured(work: Path, setting: Setting, rounds: int, tell: Connection) -> None:
    """Measure; ``tell`` is sent (done, total, what) again and again, and at last all that was measured."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits ends this one
    model, _ = load_model(dtype=setting.dtype)
    library = ExpertLibrary.open(shipped_experts())
    if setting.experts > len(library):
        library = write_lookalikes(library, work / "experts", setting.experts)
    prompts = setting.part == "prompt"
    began, before = time.perf_counter(), used_by_others()
    found = benchmark(
        model,
        library,
        Spectr(top_k=4),
        torch_alone=True,
        time_prompt=prompts,
        batches=() if prompts else (1, 16),
        steps=16 if setting.experts <= SHIPPED else 4,
        rounds=rounds,
        progress=lambda *told: tell.send(told),
    )
    after, wall = used_by_others(), time.perf_counter() - began
    others = None if before is None or after is None else (after - before) / wall
    tell.send({**dataclasses.asdict(found), "others": others})


def processor() -> str:
    """The processor's name and the units that decide how fast it multiplies."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    units = [name for flag, name in UNITS.items() if flag in flags]
    return (
        f"{facts.get('model name', platform.machine())}, {os.cpu_count()} cores, {', '.join(units) or 'no wide units'}"
    )


def used_by_others() -> float | None:
    """Seconds that other processes have had a core for; ``None`` where the system does not tell."""
    try:
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    except OSError:
        return None
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK") - time.process_time()


def load(others: list[float | None]) -> str:
    """What other processes used while settings were measured."""
    known = [cores for cores in others if cores is not None]
    if not known:
        return "whether it was idle is not known"
    state = "idle" if max(known) < BUSY else "loaded"
    return f"{state}: other processes used {min(known):.2f} to {max(known):.2f} cores"


def rows(told: dict[str, Any], name: str, aims: Aims | None) -> Iterator[tuple[str, ...]]:
    """One for each work."""
    timings = {key: Timing(seconds=tuple(one["seconds"]), peak=one["peak"]) for key, one in told["timings"].items()}
    for work, limit in told["limits"].items():
        base, ours, single, arrow, plain = (
            timings[f"{subject} | {work}"] for subject in (BASE, OURS, "peft, one adapter", "peft, Arrow", BY_TORCH)
        )
        prompt = work.startswith("prompt")
        most = aims and (
            aims.single_prompt if prompt else aims.single_token if work.endswith("batch 1") else aims.single_batch
        )
        yield (
            name,
            work,
            _marked(ours.over(single), most),
            _marked(arrow.over(ours), aims and (aims.arrow_prompt if prompt else aims.arrow_decoding), least=True),
            _marked(ours.over(plain), 1.0),
            _marked(ours.peak / single.peak, aims and aims.memory),
            f"{ours.over(base):.2f}",
            f"{limit:.2f}",
        )
        name = ""


def _marked(ratio: float, aim: float | None, *, least: bool = False) -> str:
    """A ratio and its aim, marked if it is missed."""
    if aim is None:
        return f"{ratio:.2f}"
    text = f"{ratio:.2f} ({'>=' if least else '<='} {aim:g})"
    return text if (ratio >= aim if least else ratio <= aim) else f"[bold]{text} *[/]"


if __name__ == "__main__":
    main()
