"""What a decision for a whole prompt costs inside vLLM: seconds to an answer with it, and to one without.

    $ python benchmarks/vllm_prompts.py --rounds 24

One engine with the nine shipped experts and ``calibrated``, behind the gateway as ``spectr serve`` has it, with
compiled graphs and without cached prefixes. A request may use all experts, so that its prompt is read first and then
answered, or names one. Both take turns with the same prompts, one at a time; it prints medians and quartiles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from typing import Any

LENGTH = 256
KINDS = (1, 32)  # tokens of an answer
OPTIONS = ("--max-model-len", "1024", "--max-num-seqs", "16", "--max-num-batched-tokens", "2048")


async def seconds(client: Any, ids: list[int], new: int, experts: list[str] | None) -> float:
    """One request's, from asked to answered."""
    body = {"model": "spectr", "prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    answer = await client.post("/v1/completions", json=body | ({"experts": experts} if experts else {}))
    took = time.perf_counter() - began
    answer.raise_for_status()
    return took


async def measured(given: argparse.Namespace) -> list[dict[int, tuple[float, float]]]:
    """By round and kind the seconds of a request that names its expert, and of one that is decided on."""
    import httpx

    from spectr import ExpertLibrary
    from spectr.composed_model import Settings
    from spectr.models import fetch_default_model
    from spectr.serving.engines.vllm import launched
    from spectr.serving.gateway import Gateway
    from spectr.shipped import shipped_experts

    settings = Settings(library=str(shipped_experts()), router={"name": "calibrated"})
    options = (*OPTIONS, "--dtype", given.dtype, "--no-enable-prefix-caching")
    names, rounds = ExpertLibrary.open(shipped_experts()).names, []
    started = launched(str(fetch_default_model()), settings, base_model="base", record=False, options=options)
    async with started as (app, engine):
        transport = httpx.ASGITransport(app=Gateway(app, engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=600) as client:
            for number in range(-2, given.rounds):  # two to warm up
                ids = random.Random(number).choices(range(100, 40_000), k=LENGTH)
                told: dict[int, tuple[float, float]] = {}
                for new in KINDS:
                    ways = {"named": [names[number % len(names)]], "decided": None}
                    order = sorted(ways, reverse=number % 2 == 0)
                    took = {way: await seconds(client, ids, new, ways[way]) for way in order}
                    told[new] = (took["named"], took["decided"])
                print(json.dumps([number, told]), file=sys.stderr)
                rounds.append(told)
    return rounds[2:]


def table(rounds: list[dict[int, tuple[float, float]]]) -> str:
    lines = ["| new tokens | one named, s | decided on, s | difference, s |", "| --- | --- | --- | --- |"]
    for new in KINDS:
        named, decided = zip(*(told[new] for told in rounds), strict=True)
        more = [b - a for a, b in zip(named, decided, strict=True)]
        lines.append(f"| {new} | {spread(named)} | {spread(decided)} | {spread(more)} |")
    return "\n".join(lines)


def spread(values: Any) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    rounds = asyncio.run(measured(given))
    print(f"python benchmarks/vllm_prompts.py {' '.join(sys.argv[1:])}\n\n{table(rounds)}")


if __name__ == "__main__":
    main()
