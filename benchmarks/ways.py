"""How long each way takes for all linear layers of SmolLM2-135M, compared with torch's base layer and one LoRA adapter.

    $ python benchmarks/ways.py --experts 9 --dtype float32

One thread, by the time for which it had a core, so that other processes disturb little. Attention and the rest of the
model are not in it: a model's ratios are nearer to one. SPECTR_KERNELS has no effect here.

The last lines compare the products ``A x`` of layers that read the same input (q, k and v; gate and up): a product for
each layer, and a product for all of them together.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn.functional import linear

from spectr.ops import backend_for
from spectr.ops.fused_linear import Experts, Way
from spectr.ops.timing import Clock, time_in_turn
from spectr.ops.trials import measure
from spectr.ops.ways import TOKENS, Shape

BLOCKS, INPUTS, SHARING = 30, 576, (3, 2)  # how many layers of a block read the same input
LAYERS = {(576, 576): 60, (576, 192): 60, (576, 1536): 60, (1536, 576): 30}
RANK, TOP_K = 8, 4
BASE, ADAPTER = "base layer", "one adapter"


def one_adapter(experts: Experts, x: Tensor, _: Tensor | None, out: Tensor) -> bool:
    """Add the first expert's output as PEFT does."""
    out += linear(linear(x, experts.A_PI[:RANK]), experts.Bt_PO[:RANK].mT) * 2.0
    return True


def print_shared(experts: int, dtype: torch.dtype, seconds: float) -> None:
    """Time the products of scores, layer by layer and together."""
    A_LPI = torch.randn(max(SHARING), experts * RANK, INPUTS).to(dtype)
    for tokens in TOKENS:
        x = torch.randn(tokens, INPUTS).to(dtype)
        total = dict.fromkeys(("each layer", "together"), 0.0)
        for layers in SHARING:
            some = A_LPI[:layers]
            found = time_in_turn(
                {
                    "each layer": lambda x=x, some=some: [linear(x, A_PI) for A_PI in some],
                    "together": lambda x=x, some=some: linear(x, some.flatten(0, 1)).split(some.shape[1], -1),
                },
                seconds,
                Clock(now=time.thread_time),
            )
            for way, one in found.items():
                total[way] += 1000 * BLOCKS * one
        print(f"{tokens} tokens, scores of shared inputs, ms: {', '.join(f'{k} {v:.1f}' for k, v in total.items())}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=3, help="time for each shape")
    given = parser.parse_args()
    torch.set_num_threads(1)
    backend, dtype = backend_for("cpu").backend, getattr(torch, given.dtype)
    if backend is None:
        parser.error(f"there are no kernels here: {backend_for('cpu').reason}")
    ways = {
        **backend.ways(dtype, True),  # pyright: ignore[reportAttributeAccessIssue]
        BASE: Way(base=linear, add=lambda *_: True),
        ADAPTER: Way(base=linear, add=one_adapter),
    }
    times_of: dict[int, dict[str, list[float]]] = {tokens: defaultdict(list) for tokens in TOKENS}
    for (inputs, outputs), count in LAYERS.items():
        shape = Shape(dtype, inputs, outputs, RANK, given.experts, TOP_K)
        for tokens, times in zip(TOKENS, measure(ways, shape, given.seconds, Clock(now=time.thread_time)), strict=True):
            fastest = min(seconds for way, seconds in times.items() if way not in (BASE, ADAPTER))
            for way, seconds in {**times, "fastest": fastest}.items():
                times_of[tokens][way].append(1000 * count * seconds)
    for tokens, times in times_of.items():  # of ways that there was time for at each shape
        total = {way: sum(some) for way, some in times.items() if len(some) == len(LAYERS)}
        print(f"{tokens} tokens, ms: " + ", ".join(f"{way} {total[way]:.1f}" for way in sorted(total, key=total.get)))  # pyright: ignore
    print_shared(given.experts, dtype, given.seconds / len(TOKENS))


if __name__ == "__main__":
    main()
