"""Routing against the rank of the experts: the right expert's score as a share of the largest, and who is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from spectr.errors import DataError
from spectr.evaluation.experiments.setup import ExperimentSetup, Result, percent
from spectr.evaluation.expert_recall import Finding, over_runs

ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("arrow", {"top_k": 1}),
    ("spectr", {"top_k": 1}),
    ("spectr-projection", {"top_k": 1}),
    ("calibrated", {}),
]


_VALUES: dict[str, Callable[[Finding], float]] = {
    "ratio": lambda finding: finding.ratio,
    "tokens": lambda finding: finding.top_1,
    "prompts": lambda finding: finding.place == 1,
}


def ranks(setup: ExperimentSetup) -> Result:
    """The ratio of the right expert's score to the largest, by rank, among experts that differ only in rank.

    And how often that expert is found.

    Source: SpectR, Figure 6: the ratio, by token and module.

    Raises:
        DataError: No library of experts of other ranks was given.
    """
    if not setup.ranks:
        raise DataError(
            "there are no experts of other ranks",
            expected="--ranks FOLDER, which holds adapters named EXPERT-rRANK, such as sst2-r16",
            do="train some: spectr train --task sst2 --rank 16 --out runs/ranks/sst2-r16",
        )
    rows, data = [], {}
    for rank, library in sorted(setup.ranks.items()):
        known = library.with_calibration(setup.calibration_of(library, f"ranks: calibrating rank {rank}"))
        among = dataclasses.replace(setup, library=known, seeds=())
        for label, router in among.routers(ROUTERS):
            runs = among.find_over_seeds(router, f"ranks: rank {rank}, {label}")
            found = {what: over_runs(runs, value) for what, value in _VALUES.items()}
            rows.append([rank, label, *map(percent, found.values())])
            data.setdefault(label, {})[str(rank)] = {what: [m.value, m.error] for what, m in found.items()}
    experts = sorted({name for library in setup.ranks.values() for name in library})
    return Result(
        name="ranks",
        title="Routing against the rank of the experts",
        source="SpectR, Figure 6",
        columns=["rank", "router", "score, of the largest", "tokens, first", "prompts, by vote"],
        rows=rows,
        data={"routers": data, "chance": 1 / len(experts)},
        notes=[
            f"Libraries of {len(experts)} experts ({', '.join(experts)}) that differ only in rank. By chance "
            f"{1 / len(experts):.1%} are first. Score: the right expert's divided by the largest, mean over tokens and "
            "modules, then over prompts. With fewer experts it is larger. ± one standard error over prompts.",
            *among.remarks(),
            *among.left_out(ROUTERS),
        ],
        origin=setup.origin(),
    )
