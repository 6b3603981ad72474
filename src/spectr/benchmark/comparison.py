"""A benchmark: what to measure, one run of all models and tasks, its table, and the limits set by the hardware."""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectr
from spectr.benchmark.measure import Timing, Work, measure
from spectr.benchmark.subjects import (
    BASE,
    OURS,
    PEERS,
    Subject,
    alike,
    by_torch,
    check_count,
    check_peers,
    get_peer,
    ours,
    write_lookalikes,
)
from spectr.errors import SpectrError
from spectr.flops import forward_flops
from spectr.layers.linear_layers import input_device
from spectr.layers.routed_linear import RoutedLinear
from spectr.library import ExpertLibrary
from spectr.library.needs import DESCRIBED, SIDE_DATA, Indexed
from spectr.models.text import configured_context
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
        ids = torch.zeros(1, work.prompt, dtype=torch.long, device=input_device(base))
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


Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a benchmark, which are checked together.

    Attributes:
        library: The experts.
        router: The router that chooses them.
        peers: Names in :data:`spectr.benchmark.PEERS`.
        experts: Number of experts, if it differs from the library's: synthetic experts are added.
        prompt: Length of the prompt in tokens.
        batches: Batch sizes for decoding.
        steps: Number of tokens to decode in a round.
        rounds: Number of rounds.

    Raises:
        SpectrError: A peer cannot hold the experts, the router cannot be timed, or the library cannot have this size.
    """

    library: ExpertLibrary
    router: Router
    peers: Sequence[str]
    experts: int | None = None
    prompt: int = 256
    batches: Sequence[int] = (1, 16)
    steps: int = 16
    rounds: int = 7

    def __post_init__(self) -> None:
        check_peers(self.peers, self.library)
        if DESCRIBED in self.router.needs:
            raise SpectrError(f"{self.router} writes text for every prompt", do="time its token router: -r phatgoose")
        if self.experts is not None:
            check_count(self.library, self.experts)
        if (self.experts or 0) > len(self.library) and _needs_measures(self.router):
            raise SpectrError(
                "synthetic experts have no calibration and no gates", do="-r spectr, -r arrow, -r lag, -r seqr or -r mu"
            )

    def check_base(self, config: Any, *_: Any) -> None:
        """Check the configuration of the base model, before its weights are read.

        Raises:
            SpectrError: The model's context is too short for the plan.
        """
        context = configured_context(config)
        if context is not None and self.prompt + self.steps > context:
            raise SpectrError(
                f"--prompt {self.prompt} and --steps {self.steps}",
                expected=f"at most {context} tokens in all, the model's context",
            )


def read_peers(against: str | None) -> list[str]:
    """Read the names of peers, separated by commas, or "none". The default is all of them.

    Raises:
        CompositionError: A name is unknown.
    """
    named = PEERS if against is None else map(str.strip, against.split(","))
    peers = [name for name in named if name not in ("", "none")]
    for name in peers:
        get_peer(name)
    return peers


def fitting_peers(peers: Sequence[str], library: ExpertLibrary) -> list[str]:
    """The peers that can hold the experts. PEFT's Arrow needs experts of the same ranks and modules."""
    return [name for name in peers if name != "peft-arrow" or alike(library)]


def read_batches(text: str) -> list[int]:
    """Read batch sizes, separated by commas.

    Raises:
        SpectrError: A batch size is not a number of at least 1.
    """
    try:
        batches = [int(number) for number in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise SpectrError(f"--batch {text}", expected="numbers of at least 1, separated by commas: 1,16")
    return batches


def run_plan(plan: Plan, model: nn.Module, progress: Progress = lambda *_: None) -> Outcome:
    """Run a plan with a model.

    Args:
        plan: What to measure.
        model: The base model.
        progress: Receives (phase, done, total, remark).

    Raises:
        SpectrError: The model's context is too short for the plan.
    """
    plan.check_base(model.config)
    library = plan.library
    with tempfile.TemporaryDirectory(prefix="spectr-benchmark-") as folder:
        if plan.experts and plan.experts != len(library):
            library = write_lookalikes(
                library,
                Path(folder),
                plan.experts,
                progress=lambda done, total: progress("making experts", done, total, ""),
            )
        return benchmark(
            model,
            library,
            plan.router,
            peers=plan.peers,
            prompt=plan.prompt,
            batches=plan.batches,
            steps=plan.steps,
            rounds=plan.rounds,
            progress=lambda done, total, what: progress("timing", done, total, what),
        )


def _needs_measures(router: Router) -> bool:
    """Whether a router needs calibration or trained gates of each expert."""
    return any(need in SIDE_DATA or isinstance(need, Indexed) for need in router.needs)
