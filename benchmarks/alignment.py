"""Spectral alignment of a library's experts, against the dense SVD of the same products.

The library is aligned whole, module by module, as composing does it. The dense SVD is timed on the modules of one block
only, interleaved with ours on the same modules, since all of them would take many minutes.

    python benchmarks/alignment.py [--library DIR] [--runs 5]
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from spectr import ExpertLibrary
from spectr.adapters import Factors
from spectr.shipped import shipped_experts
from spectr.spectral import align


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=None, help="folder of experts; the shipped ones by default")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    modules = read_modules(ExpertLibrary.open(arguments.library or shipped_experts()))
    block = {name: factors for name, factors in modules.items() if re.search(r"\.0\.", name)} or modules
    whole, ours, dense = [], [], []
    align_all(modules)
    for _ in range(arguments.runs):
        whole.append(seconds(lambda: align_all(modules)))
        ours.append(seconds(lambda: align_all(block)))
        dense.append(seconds(lambda: dense_all(block)))
    count = sum(map(len, modules.values()))
    table = Table("what", "expert-modules", "median s", "least s", "most s")
    for what, number, times in (
        ("align, all modules", count, whole),
        ("align, one block", sum(map(len, block.values())), ours),
        ("torch.linalg.svd of the products, one block", sum(map(len, block.values())), dense),
    ):
        table.add_row(what, str(number), f"{statistics.median(times):.3f}", f"{min(times):.3f}", f"{max(times):.3f}")
    console = Console()
    console.print(table)
    ratio = statistics.median(d / o for d, o in zip(dense, ours, strict=True))
    console.print(f"dense SVD over ours, same products, median of {arguments.runs} pairs: {ratio:.0f} times")
    console.print(f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.processor()}")


def read_modules(library: ExpertLibrary) -> dict[str, list[Factors]]:
    modules: dict[str, list[Factors]] = {}
    with ExitStack() as files:
        for name in library:
            read = files.enter_context(library[name].open())
            for module in library[name].shapes:
                pair = read(module)
                modules.setdefault(module, []).append(Factors(pair.A.float(), pair.B.float(), pair.scale))
    return modules


def align_all(modules: dict[str, list[Factors]]) -> None:
    for factors in modules.values():
        align(
            torch.stack([pair.A for pair in factors]),
            torch.stack([pair.B for pair in factors]),
            torch.tensor([pair.scale for pair in factors]),
        )


def dense_all(modules: dict[str, list[Factors]]) -> None:
    for factors in modules.values():
        for pair in factors:
            torch.linalg.svd(pair.scale * pair.B @ pair.A, full_matrices=False)


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
