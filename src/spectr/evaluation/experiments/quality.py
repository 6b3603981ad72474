"""Expert quality: each task with the base model, and with its own expert alone."""

from __future__ import annotations

from collections import Counter

from spectr.evaluation.experiments.base import Bench, Result, percent
from spectr.routers import Oracle


def quality(bench: Bench) -> Result:
    """Accuracy of the base model and of the fine-tuned expert on its own task.

    Source: SpectR, Table 3.
    """
    tasks = bench.owned
    base = {task: bench.accuracy(task, "base") for task in tasks}
    own = {}
    for task in tasks:
        with bench.routed(Oracle(expert=bench.expert_of(task))) as routed:
            own[task] = bench.accuracy(task, "its own expert", routed)
    majority = {
        task: max(Counter(e.label for e in examples).values()) / len(examples)
        if about.choices is not None and len({e.choices for e in examples}) == 1
        else None
        for task, (about, examples) in tasks.items()
    }
    rows = []
    for task in tasks:
        share = majority[task]
        most = "" if share is None else f"{share:.1%}"
        rows.append([task, percent(base[task]), most, percent(own[task]), own[task].count])
    return Result(
        name="quality",
        title="What each expert is worth on its own task",
        source="SpectR, Table 3",
        columns=["task", "base model", "majority class", "its own expert", "examples"],
        rows=rows,
        data={
            "tasks": list(tasks),
            "base": [base[t].value for t in tasks],
            "base_error": [base[t].error for t in tasks],
            "expert": [own[t].value for t in tasks],
            "expert_error": [own[t].error for t in tasks],
            "majority": [majority[t] for t in tasks],
        },
        notes=["± one standard error over examples.", *bench.remarks()],
        origin=bench.origin(),
    )
