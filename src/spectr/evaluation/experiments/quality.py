"""Expert quality: each task with the base model, and with only its own expert."""

from __future__ import annotations

from collections import Counter

from spectr.evaluation.experiments.setup import ExperimentSetup, Result, percent
from spectr.evaluation.score import Measurement


def quality(setup: ExperimentSetup) -> Result:
    """Accuracy of the base model and of the fine-tuned expert on its own task.

    Source: SpectR, Table 3.
    """
    tasks = setup.owned
    base = {task: Measurement.of(setup.scores(task, "base")) for task in tasks}
    own = {task: Measurement.of(scores) for task, scores in setup.own_scores().items()}
    majority = {
        task: max(Counter(e.label for e in examples).values()) / len(examples)
        if about.choices is not None and len({e.choices for e in examples}) == 1
        else None
        for task, (about, examples) in tasks.items()
    }
    most = {task: "" if share is None else f"{share:.1%}" for task, share in majority.items()}
    rows = [[task, percent(base[task]), most[task], percent(own[task]), own[task].count] for task in tasks]
    return Result(
        name="quality",
        title="The value of each expert on its own task",
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
        notes=["± one standard error over examples.", *setup.remarks()],
        origin=setup.origin(),
    )
