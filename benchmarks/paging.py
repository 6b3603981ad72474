"""Which expert should leave a full cache: policies on simulated workloads, with the program's own cache.

python benchmarks/paging.py [--prompts 20000] [--load-ms 30]
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import track
from rich.table import Table

from simulate import simulate
from spectr.paging import get_policy
from workload import Workload

POLICIES = ("lru", "lfu", "lfu-aging", "polar")
WORKLOADS = {
    "Zipf 1.0": Workload(),
    "Zipf 1.0, drifting": Workload(drift=500),
    "Zipf 0.6, drifting": Workload(exponent=0.6, drift=500),
    "Zipf 1.0, 10,000 experts": Workload(experts=10_000),
    "Zipf 1.0, 10,000, drifting": Workload(experts=10_000, drift=500),
}
ROOMS = (16, 64, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20_000, help="of each workload; the second half counts")
    parser.add_argument("--load-ms", type=float, default=30.0, help="milliseconds that reading an expert takes")
    arguments = parser.parse_args()
    table = Table("workload", "room", *(f"{policy}: hits, ms a prompt" for policy in POLICIES))
    for name, workload in WORKLOADS.items():
        for room in track(ROOMS, name):
            cells = []
            for policy in POLICIES:
                result = simulate(
                    workload, get_policy(policy), room=room, prompts=arguments.prompts, load_ms=arguments.load_ms
                )
                cells.append(f"{result.hit_rate:.1%}, {result.added:.1f}")
            table.add_row(name, str(room), *cells)
    console = Console(width=120)
    console.print(table)
    console.print(f"the second half of {arguments.prompts} prompts; {arguments.load_ms} ms to read an expert")


if __name__ == "__main__":
    main()
