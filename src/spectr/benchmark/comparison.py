"""One run of all models and tasks to time, its table, and the limits set by the hardware."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import spectr
from spectr.benchmark.measure import Timing, Work, measure
from spectr.benchmark.subjects import BASE, OURS, Subject, by_torch, get_peer, ours
from spectr.flops import forward_flops
from spectr.layers.routed import RoutedLinear
from spectr.library import ExpertLibrary
from spectr.ops import backend_for
from spectr.routers import Router

COLUMNS = ("work", "model", "time", "over the base", "theirs over ours", "limit", "memory")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a benchmark.

    Attributes:
        rows: One row for each work and model, with the columns of :data:`COLUMNS`.
        timings: For each "model | work", the seconds of every round and the memory peak in bytes.
        limits: For each work, the least possible ratio to the base model, by added operations (prompt) or bytes
            (decoding).
        origin: Model, experts, router, dtype, threads, versions, machine.
        backends: What :func:`explain` says about the routed model.
    """

    rows: Sequence[Sequence[str]]
    timings: Mapping[str, Mapping[str, Any]]
    limits: Mapping[str, float]
    origin: Mapping[str, Any]
    backends: Sequence[str] = ()


def benchmark(
    model: nn.Module,
    library: ExpertLibrary,
    router: Router,
    *,
    peers: Sequence[str] = ("peft-single", "peft-arrow"),
    torch_alone: bool = False,
    prompt: int = 256,
    time_prompt: bool = True,
    batches: Sequence[int] = (1, 16),
    steps: int = 16,
    rounds: int = 7,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Outcome:
    """Time a base model, the same model with routing, and peers, in turn.

    Args:
        model: A causal model from transformers that is not composed.
        library: The experts.
        router: The router that chooses them.
        peers: Names in :data:`spectr.benchmark.PEERS`.
        torch_alone: Whether to time the routed model without kernels too.
        prompt: Length of the prompt in tokens.
        time_prompt: Whether to time a single prompt too.
        batches: Batch sizes for decoding, each after prompts of that length.
        steps: Number of tokens to decode in a round.
        rounds: Number of rounds.
        progress: Receives (done, total, what).

    Raises:
        CompositionError: The router does not fit the library, or a peer is unknown.
        MissingExtraError: A peer's package is not installed.
    """
    make = [get_peer(name) for name in peers]
    top_k = min(router.selection.k or len(library), len(library))
    routed = ours(model, library, router)
    subjects = [Subject(name=BASE, model=model), routed, *(peer(model, library, top_k) for peer in make)]
    subjects += [by_torch(model, library, router)] if torch_alone else []
    works = [Work(prompt=prompt, batch=batch, steps=steps) for batch in batches]
    works = [Work(prompt=prompt), *works] if time_prompt else works
    timings = measure(subjects, works, rounds=rounds, progress=progress)
    limits = {work.name: limit(model, routed.model, work) for work in works}
    rows = [_row(subject.name, work, timings, limits) for work in works for subject in subjects]
    return Outcome(
        rows=rows,
        timings={" | ".join(key): asdict(timing) for key, timing in timings.items()},
        limits=limits,
        origin=_origin(model, library, router, rounds=rounds, prompt=prompt),
        backends=explain(routed.model),
    )


def explain(model: nn.Module) -> list[str]:
    """A line for each way that routed layers are computed: the number of layers, the backend, and the reason."""
    found: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(layer, RoutedLinear):
            plan = None if layer.factors is None else layer.factors.plan
            found["no expert is in memory" if plan is None else plan.summary] += 1
    return [f"{count} layers: {why}" for why, count in found.most_common()]


def _row(
    name: str, work: Work, timings: Mapping[tuple[str, str], Timing], limits: Mapping[str, float]
) -> tuple[str, ...]:
    mine, base, routed = (timings[subject, work.name] for subject in (name, BASE, OURS))
    return (
        work.name if name == BASE else "",
        name,
        f"{mine.median * 1e3:.1f} ms",
        f"{mine.over(base):.2f}",
        "" if name in (BASE, OURS) else f"{mine.over(routed):.2f}",
        f"{limits[work.name]:.2f}" if name == OURS else "",
        f"{mine.peak / 1e6:.1f} MB",
    )


@torch.inference_mode()
def limit(base: nn.Module, routed: nn.Module, work: Work) -> float:
    """The least possible time relative to the base model: only operations (prompt) or memory reads (decoding) count.

    Args:
        base: The base model alone.
        routed: The base model with experts.
        work: What is timed.
    """
    layers = [layer for layer in routed.modules() if isinstance(layer, RoutedLinear)]
    if not work.steps:
        ids = torch.zeros(1, work.prompt, dtype=torch.long, device=next(base.parameters()).device)
        return forward_flops(routed, ids) / forward_flops(base, ids)
    plain = sum(p.numel() * p.element_size() for p in base.parameters())
    return 1 + sum(layer.bytes_read(work.batch) for layer in layers) / plain


def _origin(model: nn.Module, library: ExpertLibrary, router: Router, **settings: int) -> dict[str, Any]:
    weight = next(model.parameters())
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else platform.processor() or "cpu"
    return {
        "model": str(getattr(getattr(model, "config", None), "_name_or_path", "")),
        "experts": len(library),
        "router": repr(router),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "kernels": backend_for(weight.device.type).reason,
        "device": device,
        "torch": torch.__version__,
        "spectr": spectr.__version__,
        **settings,
    }
