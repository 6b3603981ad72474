"""What routing costs on a GPU, compared with the base model and PEFT. Nothing is downloaded: weights are random.

    $ python benchmarks/gpu.py --experts 9 64 --dtype bfloat16 float32
    $ python benchmarks/gpu.py --shape llama-3.1-8b --experts 9 --rank 16

Prompts and decoding are timed as transformers runs them, in turn (``spectr benchmark``): for one token the launching of
kernels is then most of the time, for every model. Decoding is timed as a captured CUDA graph too, which is what the GPU
itself has to do, and how engines run it; so is a layer by itself.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from spectr import ExpertLibrary, Spectr
from spectr.adapters.write import write_adapter
from spectr.benchmark import PEERS, Subject
from spectr.benchmark.comparison import limit
from spectr.benchmark.measure import Timing, Work, measure
from spectr.benchmark.subjects import BASE, OURS, ours
from spectr.layers import RoutedLinear
from spectr.spectral import Share, Stack

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
REPLAYS = 50
GRAPH = ", as a graph"


def base_model(shape: str, dtype: torch.dtype) -> nn.Module:
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_experts(model: nn.Module, folder: Path, count: int, rank: int) -> ExpertLibrary:
    """Experts of all linear layers but the head."""
    linear = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"
    }
    for number in range(count):
        factors = {
            name: (factor(layer.out_features, rank), factor(rank, layer.in_features)) for name, layer in linear.items()
        }
        target = folder / f"expert-{number:03}"
        target.mkdir()
        write_adapter(target, factors, {"base_model_name_or_path": None, "task_type": "CAUSAL_LM"})
    return ExpertLibrary.from_adapters({path.name: path for path in sorted(folder.iterdir())})


def factor(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns, device="cuda") * 0.3 * columns**-0.5).bfloat16()


def graph(model: nn.Module, work: Work) -> Callable[[], float]:
    """Capture one decoded token; the call replays it and tells the seconds of one."""
    chance = torch.Generator().manual_seed(work.batch)
    ids = torch.randint(1000, (work.batch, work.prompt), generator=chance).cuda()
    cache: Any = StaticCache(config=model.config, max_cache_len=work.prompt + 2 * REPLAYS)  # pyright: ignore[reportArgumentType]
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    last = ids[:, -1:].clone()

    def step() -> None:
        model(input_ids=last, past_key_values=cache, use_cache=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()

    def replay() -> float:
        last.copy_(ids[:, -1:])  # the graph reads and writes these very tensors: the same token and place again
        for layer in cache.layers:
            layer.cumulative_length.fill_(work.prompt)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            captured.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / REPLAYS

    return replay


@torch.inference_mode()
def graphs(subjects: list[Subject], works: list[Work], rounds: int) -> dict[tuple[str, str], Timing]:
    found: dict[tuple[str, str], Timing] = {}
    for work in works:
        replays: dict[str, Callable[[], float]] = {}
        for subject in subjects:
            try:
                replays[subject.name] = graph(subject.model, work)
                replays[subject.name]()
            except RuntimeError as error:  # what waits for the GPU within a step cannot be captured
                print(f"{subject.name} as a graph: {str(error).splitlines()[0]}")
                torch.cuda.synchronize()
        seconds = {name: [] for name in replays}
        for _ in range(rounds):
            for name, replay in replays.items():
                seconds[name].append(replay())
        for name, told in seconds.items():
            found[name, work.name + GRAPH] = Timing(seconds=tuple(told), peak=0)
    return found


@torch.inference_mode()
def layers(shape: str, experts: int, rank: int, top_k: int, dtype: torch.dtype) -> str:
    """A linear layer by itself, the launching of its kernels left out: microseconds for some numbers of tokens."""
    from triton import testing  # which a machine without a GPU need not have

    narrow, wide = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    placed = torch.device("cuda"), dtype
    parts = {
        f"expert-{number:03}": Share(torch.randn(rank, narrow), torch.randn(wide, rank)).to(*placed)
        for number in range(experts)
    }
    layer = RoutedLinear(
        nn.Linear(narrow, wide, bias=False, device="cuda", dtype=dtype), Stack.of(parts), Spectr(top_k=top_k)
    )
    A, B = parts["expert-000"].A, parts["expert-000"].B
    lines = [
        f"| {narrow} to {wide}, us | base | one adapter, as PEFT computes it | ours |",
        "| --- | --- | --- | --- |",
    ]
    for tokens in (1, 16, 64, 256, 1024):
        x = torch.randn(tokens, narrow, device="cuda", dtype=dtype)
        ways = (lambda x=x: layer.base(x), lambda x=x: layer.base(x) + x @ A.mT @ B.mT * 2.0, lambda x=x: layer(x))
        timed: Any = testing.do_bench_cudagraph  # tells one number, or as many quantiles as asked for
        told = [f"{timed(way, rep=10) * 1e3:.1f}" for way in ways]
        lines.append(f"| {tokens} | {' | '.join(told)} |")
    return "\n".join(lines)


def table(timings: dict[tuple[str, str], Timing], limits: Mapping[str, float]) -> str:
    """Times; the limit is what operations (prompt) or bytes (decoding) leave."""
    heads = ("work", "model", "time", "over the base", "over ours", "limit", "memory")
    lines = [f"| {' | '.join(heads)} |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for (name, work), timing in sorted(timings.items(), key=lambda item: item[0][1]):
        base, routed = timings[BASE, work], timings[OURS, work]
        memory = f"{timing.peak / 1e6:.1f} MB" if timing.peak else ""
        times = f"{timing.median * 1e3:.2f} ms | {timing.over(base):.2f} | {timing.over(routed):.2f}"
        least = f"{limits[work.removesuffix(GRAPH)]:.2f}" if name == OURS else ""
        lines.append(f"| {work} | {name} | {times} | {least} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--experts", type=int, nargs="+", default=[9, 64])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--against", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: for a CPU run `spectr benchmark`")
    works = [Work(prompt=given.prompt), *(Work(prompt=given.prompt, batch=b, steps=16) for b in given.batch)]
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; medians of {given.rounds} rounds in turn",
        flush=True,
    )
    for dtype in given.dtype:
        model = base_model(given.shape, getattr(torch, dtype))
        for count in given.experts:
            with tempfile.TemporaryDirectory() as folder:
                library = random_experts(model, Path(folder), count, given.rank)
                subjects = [
                    Subject(name=BASE, model=model),
                    ours(model, library, Spectr(top_k=given.top_k)),
                    *(PEERS[peer](model, library, given.top_k) for peer in given.against),
                ]
            timings = dict(measure(subjects, works, rounds=given.rounds))
            print(f"\n{given.shape}, {count} experts of rank {given.rank}, the best {given.top_k}, {dtype}\n")
            limits = {work.name: limit(model, subjects[1].model, work) for work in works}
            print(table(timings, limits), flush=True)
            print(table(graphs(subjects, works[1:], given.rounds), limits), flush=True)
            print(layers(given.shape, count, given.rank, given.top_k, getattr(torch, dtype)), flush=True)


if __name__ == "__main__":
    main()
