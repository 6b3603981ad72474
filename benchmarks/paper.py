r"""The paper's experiments on a base model of your choice: nine experts by its settings, then every table and figure.

    python benchmarks/paper.py --base google/gemma-2-2b-it --work WORK

Needs a GPU and the Hub (extras "train" and "evaluate"); the paper's other bases go the same way. Experts as in section
4.1 and Appendix B: rank 8, alpha 16, dropout 0.05, all linear layers, one pass, batches of 8, 1e-4 constant, answers as
letters, one seed for all nine. With --ranks 2,4,16,32,64 also those of Figure 6, five times as many. Then the
experiments, and WORK/report.html. Killed, it goes on where it stopped. docs/appendix/paper-and-code.md says what
differs from the paper.

A rehearsal on a CPU, with the small base, rows on disk and four experts, as four are chosen for a token:

    python benchmarks/paper.py --work WORK --data-root DATA --dtype float32 --tasks sst2,cola,mrpc,qqp --examples 16 \
        --limit 2 --ranks 4
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from report import Step, run, spectr  # next to this file
from spectr.tasks import shipped_tasks

SETTINGS = (
    "--letters --dropout 0.05 --target-modules all-linear --batch-size 8 --learning-rate 1e-4 --schedule constant "
    "--epochs 1 --max-length 512 --seed 42"
)
EXPERIMENTS = ("quality", "similarity", "tokens", "routing", "multitask", "costs")
ROUTERS = (
    "--router mu --router arrow --router spectr --router spectr-paper --router spectr-projection --router spectr-code"
)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the base model, a Hub id or a folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--data-root", default="hub", help="folder of the tasks' data, or hub")
    parser.add_argument("--tasks", default=",".join(shipped_tasks()), help="some of the nine")
    parser.add_argument("--ranks", default="", help="other ranks for Figure 6, as 2,4,16,32,64")
    parser.add_argument("--examples", type=int, help="limit the training examples; the paper takes two thirds of all")
    parser.add_argument("--limit", type=int, help="limit the test examples of each task")
    parser.add_argument("--dtype", default="bfloat16", help="of the base model")
    parser.add_argument("--workers", type=int, default=1, help="commands at a time")
    parser.add_argument("--only-print", action="store_true", help="print the commands, and stop")
    arguments = parser.parse_args(given)
    work = arguments.work.resolve()
    parts = {"experts": experts(arguments, work), "experiments": experiments(arguments, work)}
    if arguments.only_print:
        for step in itertools.chain(*parts.values()):
            print("spectr", *step.command[3:])
        return
    (work / "ranks").mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks.split(",") if arguments.ranks else ():  # rank 8 is trained once
        (work / f"ranks/{task}-r8").unlink(missing_ok=True)
        (work / f"ranks/{task}-r8").symlink_to(work / f"experts/{task}")
    for part, steps in parts.items():
        run(steps, work, part, workers=arguments.workers)
    run([Step("page", spectr("report --page report.html"), None)], work, "page", workers=1)


def experts(arguments: argparse.Namespace, work: Path) -> list[Step]:
    """The trainings: of each task at rank 8, and at the other ranks."""
    steps = []
    ranks = sorted({int(rank) for rank in arguments.ranks.split(",") if rank} - {8})
    for rank, task in itertools.product((8, *ranks), arguments.tasks.split(",")):
        out = f"experts/{task}" if rank == 8 else f"ranks/{task}-r{rank}"
        how = f"train --task {task} --rank {rank} --alpha {2 * rank} {SETTINGS} {common(arguments)} --out {out}"
        how += f" --test-limit {arguments.limit or 200}"
        how += f" --examples {arguments.examples}" if arguments.examples else ""
        steps.append(Step(out, spectr(how), work / out / "adapter_model.safetensors"))
    return steps


def experiments(arguments: argparse.Namespace, work: Path) -> list[Step]:
    """The tables and figures."""
    limit = f"--limit {arguments.limit}" if arguments.limit else ""
    tasks = " ".join(f"--task {task}" for task in arguments.tasks.split(","))
    steps = []
    for name in (*EXPERIMENTS, *(["ranks"] if arguments.ranks else [])):
        compared = "" if name in ("quality", "similarity") else ROUTERS
        compared += " --ranks ranks" if name == "ranks" else ""
        how = f"evaluate {name} --letters --library experts {tasks} {limit} {compared} {common(arguments)}"
        steps.append(Step(name, spectr(how), work / f"out/evaluation/{name}.json"))
    return steps


def common(arguments: argparse.Namespace) -> str:
    base = f"--model {arguments.base}" if arguments.base else ""
    root = arguments.data_root if arguments.data_root == "hub" else Path(arguments.data_root).resolve()
    return f"{base} --data-root {root} --dtype {arguments.dtype}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
