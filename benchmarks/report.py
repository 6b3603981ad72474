"""The committed report, docs/appendix/report.html, made again by one command: inputs, experiments, page.

    python benchmarks/report.py --work WORK --data-root DATA

First what the repository does not ship: the held-out tasks' rows and 55 experts (all nine tasks at ranks 2 to 64, one
of four passes). Then every experiment without a result in docs/appendix/results, two at a time with one thread each,
the longest first, and the page. Killed, it goes on where it stopped; a result that is deleted is made again. Each
step's seconds are printed, and those of both parts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spectr.errors import DataError

RESULTS = Path(__file__).resolve().parents[1] / "docs/appendix/results"
_RECIPE = "--learning-rate 1e-3 --schedule linear --warmup 0.05 --dropout 0 --max-length 192 --data-root data"
_SEEDS = {
    "cola": 201,
    "qqp": 202,
    "sst2": 203,
    "agnews": 204,
    "dbpedia": 205,
    "hellaswag": 206,
    "mnli": 207,
    "mrpc": 208,
    "qnli": 209,
}
_RANKS = (2, 4, 8, 16, 32, 64)
_LONG = "--epochs 4 --examples 1600 --validation 200 --test-limit 200 --seed 306"

EXPERTS = {
    "sst2-long": f"train --task sst2 {_LONG} {_RECIPE} --out sst2-long",
    **{
        f"ranks/{task}-r{rank}": f"train --task {task} --rank {rank} --alpha {2 * rank} --examples 240 --test-limit 20 "
        f"--seed {seed} {_RECIPE} --out ranks/{task}-r{rank}"
        for rank, (task, seed) in itertools.product(_RANKS, _SEEDS.items())
    },
}
EXPERIMENTS = {  # the longest first, so that two workers end together
    "multitask": "--data-root data --limit 100",
    "wording": "--data-root data --limit 100",
    "routing": "--data-root data --limit 100",
    "heldout": "--data-root heldout --limit 100",
    "robustness": "--data-root data --limit 20 --substitute sst2=ranks/sst2-r64 --substitute sst2=sst2-long",
    "ranks": "--data-root data --limit 20 --ranks ranks",
    "quality": "--data-root data --limit 100",
    "mixed": "--data-root data --limit 4",
    "agreement": "--data-root data --limit 2",
    "tokens": "--data-root data --limit 10",
    "costs": "",
    "similarity": "",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made; 1 GB")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the tasks' data")
    parser.add_argument("--inputs", action="store_true", help="make the experts and the held-out rows, and stop")
    parser.add_argument("--dtype", default="auto", help="bfloat16 where the machine is fast at it, else float32")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    link(arguments.data_root.resolve(), work / "data")
    rows = [sys.executable, str(Path(__file__).with_name("heldout_data.py").resolve()), "--out", "heldout"]
    inputs = [
        Step("heldout", rows, work / "heldout/piqa/test.jsonl"),
        *(Step(name, spectr(how), work / name / "adapter_model.safetensors") for name, how in EXPERTS.items()),
    ]
    run(inputs, work, "inputs")
    if arguments.inputs:
        return
    dtype = "" if arguments.dtype == "auto" else f"--dtype {arguments.dtype}"
    written = work / "out/evaluation"
    experiments = [
        Step(name, spectr(f"evaluate {name} {how} {dtype}"), RESULTS / f"{name}.json", written / f"{name}.json")
        for name, how in EXPERIMENTS.items()
    ]
    run(experiments, work, "experiments")
    run([Step("page", spectr(f"report --out {RESULTS} --page {RESULTS.parent / 'report.html'}"), None)], work, "page")


def link(data: Path, place: Path) -> None:
    """``data`` under a short name, as the report quotes its commands."""
    if not data.is_dir():
        raise SystemExit(str(DataError(f"no folder {data}", do="give the tasks' data as --data-root")))
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists() and not place.is_symlink():
        raise SystemExit(str(DataError(f"{place} is in the way of a link to {data}", do="choose another --work")))
    place.unlink(missing_ok=True)
    place.symlink_to(data)


def spectr(command: str) -> list[str]:
    return [sys.executable, "-m", "spectr", *command.split()]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A command, the file that is there once it is done, and where the command writes it, if elsewhere."""

    name: str
    command: Sequence[str]
    made: Path | None
    written: Path | None = None


def run(steps: Sequence[Step], work: Path, part: str, workers: int = 2) -> None:
    """Run what is not done, and print the seconds of each and of all. Several at a time have one thread each.

    Raises:
        SystemExit: one failed; nothing more was begun.
    """
    steps = [step for step in steps if step.made is None or not step.made.exists()]
    begin = time.perf_counter()
    alone = {} if workers == 1 else {"OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor(workers) as pool:
        seconds = list(pool.map(functools.partial(call, work, threading.Event(), alone), steps))
    if None in seconds:
        raise SystemExit(f"a step failed: see {work / 'logs'}; the same command goes on")
    table = Table(part, "seconds")
    for step, taken in zip(steps, seconds, strict=True):
        table.add_row(step.name, f"{taken:.0f}")
    table.add_row(f"all, {workers} at a time", f"{time.perf_counter() - begin:.0f}")
    Console().print(table)


def call(work: Path, failed: threading.Event, more: Mapping[str, str], step: Step) -> float | None:
    """Seconds that ``step`` took; what it says goes into a file of its own."""
    if failed.is_set():
        return None
    begin = time.perf_counter()
    log = work / "logs" / f"{step.name.replace('/', '-')}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as said:
        alone = {**os.environ, **more, "COLUMNS": "100"}
        code = subprocess.call(step.command, cwd=work, env=alone, stdout=said, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - begin
    print(f"· {step.name}: {f'{seconds:.0f} s' if code == 0 else f'failed ({code}), see {log}'}", flush=True)
    if code == 0:
        if step.made is not None and step.written is not None:
            shutil.copy(step.written, step.made)
        return seconds
    failed.set()
    return None


if __name__ == "__main__":
    main()
