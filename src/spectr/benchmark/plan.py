"""What to measure, checked before a model is loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from spectr.benchmark.comparison import Outcome, benchmark
from spectr.benchmark.subjects import PEERS, alike, check_peers, get_peer
from spectr.benchmark.synthetic import check_count, write_lookalikes
from spectr.errors import SpectrError
from spectr.library import ExpertLibrary
from spectr.library.needs import DESCRIBED, SIDE_DATA, Indexed
from spectr.models.text import configured_context
from spectr.routers import Router

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
