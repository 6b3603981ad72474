"""The same tasks in words that no expert was trained on: is the right expert still found, and what is it worth."""

from __future__ import annotations

import torch

from spectr.evaluation.experiments.base import Bench, Result, percent, routers_that_fit
from spectr.evaluation.experiments.routing import ROUTERS, opening_length
from spectr.evaluation.finding import find_experts
from spectr.evaluation.score import Measurement
from spectr.routers import Oracle


def wording(bench: Bench) -> Result:
    """Routing of prompts in their own words and in each paraphrase, and accuracy against the right expert's.

    The examples of a task are dealt out among its paraphrases, so that every row of data is asked once.
    """
    bench = bench.dealt()
    skip, tasks = opening_length(bench.tokenizer), bench.owned
    rows, per_task = [], {}
    for label, router in routers_that_fit(ROUTERS, bench):
        found = {}
        with bench.routed(router) as routed:
            for done, (task, (_, examples)) in enumerate(tasks.items(), start=1):
                prompts = [example.prompt for example in examples]
                found[task] = find_experts(
                    bench.model, routed, bench.tokenizer, prompts, bench.expert_of(task), skip=skip
                )
                bench.progress(f"wording: {label}", done, len(tasks), task)
            scored = (
                {task: bench.accuracy(task, f"{label}, reworded", routed) for task in tasks} if routed.prompt else {}
            )
        flat = [finding for some in found.values() for finding in some]
        first = Measurement.of([float(finding.place == 1) for finding in flat])
        second = Measurement.of([float(finding.place <= 2) for finding in flat])
        per_task[label] = {task: sum(f.place == 1 for f in some) / len(some) for task, some in found.items()}
        rows.append([label, percent(first), percent(second), scored])
    own = {}
    for task in tasks:
        with bench.routed(Oracle(expert=bench.expert_of(task))) as routed:
            own[task] = bench.accuracy(task, "its own expert, reworded", routed)
    for row in rows:
        scored = row[3]
        shares = torch.tensor([scored[task].value / max(own[task].value, 1e-9) for task in scored])
        row[3] = f"{float(shares.mean()):.1%}" if scored else ""
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
