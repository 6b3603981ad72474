"""Unusual experts: does an expert that is large, of high rank or random attract prompts of other experts."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.adapters.write import Pair, common_settings, write_adapter
from spectr.calibration import calibrate
from spectr.errors import DataError
from spectr.evaluation.experiments.setup import ExperimentSetup, Result, percent
from spectr.evaluation.expert_recall import over_runs
from spectr.library import ExpertLibrary

ROUTERS: list[tuple[str, dict[str, Any]]] = [("arrow", {"top_k": 4}), ("spectr", {"top_k": 4}), ("calibrated", {})]
_LARGE, _RANK = 100.0, 64


def robustness(setup: ExperimentSetup) -> Result:
    """Routing if an expert is scaled by a hundred, has rank 64, or a random expert is added.

    Also if an expert is replaced by each of the setup's substitutes, such as one that was trained for longer.
    """
    rows, data, odd = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for case, name, source in [*setup.substitutes, *_made_cases(setup.library, Path(folder))]:
            library = setup.library.without(name) if name in setup.library else setup.library
            library = library.with_expert(name, source)
            if setup.library.calibration is not None:
                library = library.with_calibration(calibrate(setup.model, library, setup.tokenizer))
            changed = dataclasses.replace(setup, library=library, seeds=())
            odd[case] = name
            for label, router in changed.routers(ROUTERS):
                runs = changed.find_over_seeds(router, f"{case}: {label}")
                found = over_runs(runs, lambda finding: finding.place == 1)
                others = [task for task in runs[0] if setup.expert_of(task) != name]
                taken = over_runs(runs, lambda finding, name=name: finding.winner == name, others)
                mine = [task for task in runs[0] if setup.expert_of(task) == name]
                kept = over_runs(runs, lambda finding: finding.place == 1, mine) if mine else None
                rows.append([case, label, percent(found), percent(kept) if kept else "", percent(taken)])
                data.setdefault(case, {})[label] = {
                    "found": found.value,
                    "stolen": taken.value,
                    "own": kept.value if kept else None,
                }
    return Result(
        name="robustness",
        title="Unusual experts",
        source="ours",
        columns=["library", "router", "prompts, by vote", "its own prompts", "prompts of others that it took"],
        rows=rows,
        data={"cases": data, "odd": odd},
        notes=[
            "One expert of the library is changed or added. ± one standard error over prompts.",
            *setup.left_out(ROUTERS),
            *setup.remarks(),
        ],
        origin=setup.origin(),
    )


Change = Callable[[str, Pair, torch.Generator], Pair]


def _larger(_module: str, pair: Pair, _generator: torch.Generator) -> Pair:
    B, A = pair
    return B * _LARGE, A


def _higher_rank(
    _module: str, pair: Pair, generator: torch.Generator
) -> tuple[Float[Tensor, "outputs larger"], Float[Tensor, "larger inputs"]]:
    """The same update in factors of rank 64 at least, rotated into all their directions."""
    B, A = pair
    rank = len(A)
    Q, _ = torch.linalg.qr(torch.randn(max(_RANK, rank), rank, generator=generator, dtype=torch.float32))
    return B @ Q.T, Q @ A


def _random(_module: str, pair: Pair, generator: torch.Generator) -> Pair:
    """Random factors of the same sizes and spread."""
    B, A = pair
    other_A = torch.randn(A.shape, generator=generator, dtype=torch.float32) * A.std()
    return torch.randn(B.shape, generator=generator, dtype=torch.float32) * B.std(), other_A


_CASES: dict[str, Change] = {
    "NAME a hundred times as large": _larger,
    "NAME, the same update in factors of rank 64": _higher_rank,
    "a random expert": _random,
}


def _made_cases(library: ExpertLibrary, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Each of :data:`_CASES` with the name of the expert that it gives, and its folder."""
    first = next((name for name in library.names if not library[name].kinds), library.names[0])
    for number, (case, change) in enumerate(_CASES.items()):
        name = "random" if change is _random else first
        yield case.replace("NAME", first), name, changed_expert(library, first, folder / str(number), change)


def _pair(A: Tensor, B: Tensor, scale: float) -> Pair:
    return B.float() * scale, A.float()


def changed_expert(library: ExpertLibrary, name: str, folder: Path, change: Change) -> Path:
    """A copy of an expert in ``folder/NAME`` whose factors ``change`` has altered, float32, with the scale in ``B``.

    Raises:
        DataError: The expert is more than plain factors of linear layers.
    """
    expert, generator = library[name], torch.Generator().manual_seed(0)
    expert.check_plain("a changed copy", DataError)
    with expert.open() as read:
        pairs = {module: change(module, _pair(*read(module)), generator) for module in expert.shapes}
    target = folder / name
    target.mkdir(parents=True)
    write_adapter(target, pairs, common_settings([expert]))
    return target
