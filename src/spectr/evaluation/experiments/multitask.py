"""One model for all tasks: accuracy by router, as a share of what each task's own expert reaches."""

from __future__ import annotations

from typing import Any

from spectr.evaluation.experiments.base import Bench, Result, routers_that_fit
from spectr.evaluation.score import Measurement
from spectr.routers import Oracle

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("mu", {}),
    ("arrow", {"top_k": 4}),
    ("spectr-paper", {"top_k": 4}),
    ("spectr", {"top_k": 1}),
    ("spectr", {"top_k": 2}),
    ("spectr", {"top_k": 4}),
    ("spectr", {"top_k": 8}),
    ("spectr-softmax", {"top_k": 4}),
    ("spectr-projection", {"top_k": 4}),
    ("spectr-code", {"top_k": 4}),
    ("calibrated-token", {"top_k": 1}),
    ("calibrated-token", {"top_k": 4}),
    ("calibrated", {"top_k": 1}),
    ("calibrated", {"top_k": 2}),
]


def multitask(bench: Bench) -> Result:
    """Multi-task accuracy normalised by the fine-tuned expert, for the base model, every router, and the oracle.

    Source: SpectR, Table 2.
    """
    tasks = bench.owned
    own: dict[str, Measurement] = {}
    for task in tasks:
        with bench.routed(Oracle(expert=bench.expert_of(task))) as routed:
            own[task] = bench.accuracy(task, "its own expert", routed)
    found = {"base": {task: bench.accuracy(task, "base") for task in tasks}}
    for label, router in routers_that_fit(METHODS, bench):
        with bench.routed(router) as routed:
            found[label] = {task: bench.accuracy(task, label, routed) for task in tasks}
    found["its own expert"] = own
    rows = []
    for label, by_task in found.items():
        share, error = _normalised(by_task, own)
        rows.append([label, f"{share:.1%} ± {error:.1%}", *(f"{by_task[task].value:.1%}" for task in tasks)])
    return Result(
        name="multitask",
        title="One model for all tasks",
        source="SpectR, Table 2",
        columns=["method", "mean share of the own expert's accuracy", *tasks],
        rows=rows,
        data={
            "tasks": list(tasks),
            "methods": {
                label: {
                    "share": _normalised(by_task, own)[0],
                    "error": _normalised(by_task, own)[1],
                    "accuracy": {task: m.value for task, m in by_task.items()},
                    "accuracy_error": {task: m.error for task, m in by_task.items()},
                }
                for label, by_task in found.items()
            },
        },
        notes=[
            "Accuracy by task, and the mean over tasks of accuracy divided by that of the task's own expert on the "
            "same examples. ± one standard error over examples, the expert's own accuracy taken as given.",
            *bench.remarks(),
        ],
        origin=bench.origin(),
    )


def _normalised(by_task: dict[str, Measurement], own: dict[str, Measurement]) -> tuple[float, float]:
    shares = [by_task[task].value / max(own[task].value, 1e-9) for task in own]
    errors = [by_task[task].error / max(own[task].value, 1e-9) for task in own]
    return sum(shares) / len(shares), sum(error**2 for error in errors) ** 0.5 / len(errors)
