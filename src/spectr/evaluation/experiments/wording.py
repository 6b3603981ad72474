"""The same tasks in words that no expert was trained on: is the right expert still found, and what is it worth."""

from __future__ import annotations

from spectr.evaluation.experiments.base import Bench, Result, percent, routers_that_fit
from spectr.evaluation.experiments.routing import ROUTERS
from spectr.evaluation.score import Measurement
from spectr.routers import Oracle


def wording(bench: Bench) -> Result:
    """Routing of prompts in paraphrases of their tasks, and accuracy against the right expert's.

    The examples of a task are dealt out among its paraphrases, so that every row of data is asked once.
    """
    bench = bench.dealt()
    tasks, own = bench.owned, {}
    for task in tasks:
        with bench.routed(Oracle(expert=bench.expert_of(task))) as routed:
            own[task] = bench.accuracy(task, "its own expert, reworded", routed)
    rows, per_task = [], {}
    for label, router in routers_that_fit(ROUTERS, bench):
        with bench.routed(router) as routed:
            found = bench.find(routed, f"wording: {label}")
            share = ""
            if routed.prompt:
                scored = {task: bench.accuracy(task, f"{label}, reworded", routed) for task in tasks}
                share = f"{sum(scored[t].value / max(own[t].value, 1e-9) for t in tasks) / len(tasks):.1%}"
        flat = [finding for some in found.values() for finding in some]
        first = Measurement.of([float(finding.place == 1) for finding in flat])
        second = Measurement.of([float(finding.place <= 2) for finding in flat])
        per_task[label] = {task: sum(f.place == 1 for f in some) / len(some) for task, some in found.items()}
        rows.append([label, percent(first), percent(second), share])
    return Result(
        name="wording",
        title="The same tasks in other words",
        source="ours",
        columns=["router", "prompts, by vote", "prompts, first two", "share of the right expert's accuracy"],
        rows=rows,
        data={"tasks": list(tasks), "per_task": per_task, "own": {task: m.value for task, m in own.items()}},
        notes=[
            "Every prompt in one of three paraphrases of its task, none of which an expert was trained on. ± one "
            "standard error over prompts. Accuracy where the router decides for whole prompts, against the right "
            "expert's on the same words.",
        ],
        origin=bench.origin(),
    )
