"""What routing costs inside vLLM: tokens a second with the nine shipped experts, against the base model alone.

    $ python benchmarks/vllm_throughput.py --rounds 5

Both engines are vLLM with compiled graphs, in processes of their own, one after the other in every round. Decoding is
timed as the difference between answers of 65 tokens and of one, prompts by answers of one token; of each the median of
several repetitions. The ratio is taken within a round, and its median over rounds is told. The machine must be idle.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

KINDS = {"decoding, batch 1": (1, 16), "decoding, batch 16": (16, 16), "prompts": (4, 512)}
NEW = 64


def engine(routed: bool, given: argparse.Namespace) -> Any:
    from spectr.models import fetch_default_model
    from spectr.shipped import shipped_experts
    from vllm import LLM

    options: dict[str, Any] = {}
    if routed:
        config = {"quant_method": "spectr", "library": str(shipped_experts()), "router": {"name": given.router}}
        options = {"hf_overrides": {"quantization_config": {**config, "record": given.record}}}
    return LLM(
        str(fetch_default_model()),
        dtype=given.dtype,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        enforce_eager=given.eager,
        **options,
    )


def seconds(llm: Any, requests: int, length: int, new: int, seed: int) -> float:
    """One batch of random prompts."""
    import random

    from vllm import SamplingParams

    chance = random.Random(seed)
    prompts = [{"prompt_token_ids": chance.choices(range(100, 40_000), k=length)} for _ in range(requests)]
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - began


def measured(llm: Any, repetitions: int) -> dict[str, float]:
    """Tokens a second, by kind."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind, (requests, length) in KINDS.items():
        seconds(llm, requests, length, 2, -1)
        for seed in range(repetitions):
            short = seconds(llm, requests, length, 1, seed)
            if kind == "prompts":
                found[kind].append(requests * length / short)
            else:
                found[kind].append(requests * NEW / (seconds(llm, requests, length, NEW + 1, seed) - short))
    return {kind: statistics.median(rates) for kind, rates in found.items()}


def in_a_process(which: str, given: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", which, *sys.argv[1:]]
    env = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rounds: list[tuple[dict[str, float], dict[str, float]]]) -> str:
    lines = ["| | base, tokens/s | routed, tokens/s | ratio, median (least to most) |", "| --- | --- | --- | --- |"]
    for kind in KINDS:
        base, routed = ([told[which][kind] for told in rounds] for which in (0, 1))
        ratios = sorted(r / b for b, r in zip(base, routed, strict=True))
        told = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        lines.append(f"| {kind} | {statistics.median(base):.1f} | {statistics.median(routed):.1f} | {told} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--router", default="calibrated-token")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--record", action="store_true", help="layers keep what they choose")
    parser.add_argument("--eager", action="store_true", help="without compiled graphs")
    parser.add_argument("--one", choices=("base", "routed"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        llm = engine(given.one == "routed", given)
        told = measured(llm, given.repetitions)
        llm.llm_engine.engine_core.shutdown()
        print(json.dumps(told))
        return
    rounds = []
    for number in range(given.rounds):
        order = ("base", "routed") if number % 2 == 0 else ("routed", "base")
        told = {which: in_a_process(which, given) for which in order}
        rounds.append((told["base"], told["routed"]))
        print(json.dumps(told), file=sys.stderr)
    print(f"python benchmarks/vllm_throughput.py {' '.join(sys.argv[1:])}\n\n{table(rounds)}")


if __name__ == "__main__":
    main()
