"""What routing costs inside vLLM: tokens a second with the nine shipped experts, against the base model alone.

    $ python benchmarks/vllm_throughput.py --rounds 12

Both engines are vLLM with compiled graphs, in separate processes; one is stopped while the other is timed.
They alternate every few seconds, so that a temporarily slow machine affects both. The ratio is taken
within a turn, and its median and quartiles are printed. Decoding is timed as the difference between answers of
65 tokens and of one, prompts by answers of one token.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

KINDS = {"decoding, batch 1": (1, 16), "decoding, batch 16": (16, 16), "prompts": (4, 512)}
NEW = 64
READY = "engine:"  # begins the lines that are meant for whoever asks


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


def rate(llm: Any, kind: str, seed: int) -> float:
    """Tokens a second."""
    requests, length = KINDS[kind]
    short = seconds(llm, requests, length, 1, seed)
    if kind == "prompts":
        return requests * length / short
    return requests * NEW / (seconds(llm, requests, length, NEW + 1, seed) - short)


def serve(which: str, given: argparse.Namespace) -> None:
    """One engine, which is asked by lines of JSON."""
    llm = engine(which == "routed", given)
    for requests, length in KINDS.values():
        seconds(llm, requests, length, 2, -1)
    print(READY, flush=True)
    for line in sys.stdin:
        print(READY, rate(llm, *json.loads(line)), flush=True)


class Timed:
    """An engine's process, with those that it starts; they run while it is asked, and at no other time."""

    def __init__(self, which: str):
        command = [sys.executable, __file__, "--one", which, *sys.argv[1:]]
        env = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", **os.environ}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
        self._reply()

    def rate(self, kind: str, seed: int) -> float:
        os.killpg(self.process.pid, signal.SIGCONT)
        print(json.dumps([kind, seed]), file=self.process.stdin, flush=True)
        return float(self._reply()[0])

    def __enter__(self) -> Timed:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # all of them, stopped or not
        self.process.communicate()

    def _reply(self) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # the engine writes there too
            if line.startswith(READY):
                os.killpg(self.process.pid, signal.SIGSTOP)
                return line.split()[1:]
        raise SystemExit("an engine has ended")


def table(rounds: list[dict[str, tuple[float, float]]]) -> str:
    lines = ["| | base, tokens/s | routed, tokens/s | ratio, median (quartiles) |", "| --- | --- | --- | --- |"]
    for kind in KINDS:
        base, routed = (statistics.median(told[kind][which] for told in rounds) for which in (0, 1))
        ratios = [told[kind][1] / told[kind][0] for told in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        lines.append(f"| {kind} | {base:.1f} | {routed:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--router", default="calibrated-token")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--record", action="store_true", help="layers keep what they choose")
    parser.add_argument("--eager", action="store_true", help="without compiled graphs")
    parser.add_argument("--one", choices=("base", "routed"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        serve(given.one, given)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left behind
    rounds = []
    with Timed("base") as base, Timed("routed") as routed:
        for number in range(given.rounds):
            told: dict[str, tuple[float, float]] = {}
            for kind in KINDS:
                rates = {one: one.rate(kind, number) for one in ((base, routed) if number % 2 else (routed, base))}
                told[kind] = (rates[base], rates[routed])
            rounds.append(told)
            print(json.dumps(told), file=sys.stderr)
    print(f"python benchmarks/vllm_throughput.py {' '.join(sys.argv[1:])}\n\n{table(rounds)}")


if __name__ == "__main__":
    main()
