"""Does each router find the right expert: for tokens, among the first four, and for whole prompts."""

from __future__ import annotations

from typing import Any

import torch

from spectr.evaluation.experiments.base import Bench, Result, percent, routers_that_fit
from spectr.evaluation.score import Measurement
from spectr.evaluation.similarity import cosines, mean_cosines

ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("arrow", {"top_k": 4}),
    ("spectr", {"top_k": 4}),
    ("spectr-projection", {"top_k": 4}),
    ("calibrated-token", {"top_k": 1}),
    ("calibrated", {}),
]


def routing(bench: Bench) -> Result:
    """Top-1 and top-4 routing accuracy per task and router, and against the similarity of tasks.

    Source: SpectR, Tables 1 and 4, Figure 5.
    """
    tasks = bench.owned
    columns = ["router", "tokens, first", "tokens, first four", "prompts, by vote", "prompts, first two"]
    rows, per_task, winners = [], {}, {}
    for label, router in routers_that_fit(ROUTERS, bench):
        with bench.routed(router) as routed:
            findings = bench.find(routed, f"routing: {label}")
        flat = [finding for some in findings.values() for finding in some]
        measured = [
            Measurement.of([finding.top_1 for finding in flat]),
            Measurement.of([finding.top_4 for finding in flat]),
            Measurement.of([float(finding.place == 1) for finding in flat]),
            Measurement.of([float(finding.place <= 2) for finding in flat]),
        ]
        rows.append([label, *map(percent, measured)])
        per_task[label] = {
            task: {
                "top_1": sum(f.top_1 for f in some) / len(some),
                "top_4": sum(f.top_4 for f in some) / len(some),
                "prompts": sum(f.place == 1 for f in some) / len(some),
            }
            for task, some in findings.items()
        }
        winners[label] = {
            task: {name: sum(f.winner == name for f in some) / len(some) for name in bench.library.names}
            for task, some in findings.items()
        }
    mean_EE, names = mean_cosines(cosines(bench.library)), bench.library.names
    nearest = (mean_EE - 2 * torch.eye(len(names))).amax(1)
    count = len(bench.library)
    return Result(
        name="routing",
        title="Which router finds the right expert",
        source="SpectR, Tables 1 and 4, Figure 5",
        columns=columns,
        rows=rows,
        data={
            "tasks": list(tasks),
            "experts": list(names),
            "per_task": per_task,
            "winners": winners,
            "nearest": {task: float(nearest[names.index(bench.expert_of(task))]) for task in tasks},
        },
        notes=[
            f"By chance: {1 / count:.1%} first, {min(4, count) / count:.1%} among four, {min(2, count) / count:.1%} "
            "among two.",
            "Tokens: mean over a prompt's tokens after the chat template's opening and over all modules, then over "
            "prompts. Prompts: the expert with the most first places over all tokens and modules; for 'calibrated' the "
            "one that it decides for. ± one standard error over prompts.",
        ],
        origin=bench.origin(),
    )
