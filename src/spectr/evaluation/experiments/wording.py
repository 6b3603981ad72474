"""The same tasks in words that no expert was trained on: is the right expert found, and how accurate is the answer."""

from __future__ import annotations

from typing import Any

from spectr.evaluation.experiments.setup import ExperimentSetup, Result, percent, seeds_note
from spectr.evaluation.expert_recall import over_runs
from spectr.evaluation.paired_statistics import in_words, mean_share

ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("arrow", {"top_k": 4}),
    ("spectr", {"top_k": 4}),
    ("lag", {"shortlist": 3, "top_k": 1}),
    ("phatgoose", {}),
    ("glider", {}),
    ("calibrated", {}),
]


def wording(setup: ExperimentSetup) -> Result:
    """Routing of prompts in paraphrases of their tasks, and accuracy against the right expert's.

    The paraphrases of a task are assigned to its examples in turn, so that every row of data is used once.
    """
    setup = setup.paraphrased()
    tasks, own, notes = setup.owned, setup.own_scores("its own expert, reworded"), []
    rows, per_task, summary = [], {}, {}
    for label, router in setup.routers(ROUTERS):
        runs = setup.find_over_seeds(router, f"wording: {label}")
        first, second = (over_runs(runs, lambda finding, k=k: finding.place <= k) for k in (1, 2))
        share = mean_share(setup.scores_over_seeds(router, f"{label}, reworded"), own)
        per_task[label] = {task: over_runs(runs, lambda finding: finding.place == 1, [task]).value for task in tasks}
        summary[label] = {
            "first": [first.value, first.error],
            "two": [second.value, second.error],
            "share": [share.value, share.error],
        }
        base = over_runs(runs, lambda finding: finding.to_base)
        rows.append([label, percent(first), percent(second), percent(base), in_words(share)])
        notes += seeds_note(label, runs, setup)
    return Result(
        name="wording",
        title="The same tasks in other words",
        source="ours",
        columns=[
            "router",
            "prompts, by vote",
            "prompts, first two",
            "to the base",
            "share of the right expert's accuracy",
        ],
        rows=rows,
        data={
            "tasks": list(tasks),
            "summary": summary,
            "per_task": per_task,
            "own": {task: sum(values) / len(values) for task, values in own.items()},
        },
        notes=[
            "Every prompt is in one of its task's paraphrases, on which no expert was trained. Accuracy is a share of "
            "the right expert's on the same words, mean over tasks. ± one standard error over prompts; for shares, of "
            "the paired differences between method and expert. To base: prompts that the base model answers with the "
            "default of 'abstain'; in the other columns an expert always answers.",
            *notes,
            *setup.left_out(ROUTERS),
            *setup.remarks(),
        ],
        origin=setup.origin(),
    )
