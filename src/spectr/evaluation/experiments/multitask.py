"""One model for all tasks: accuracy by router, as a share of the accuracy of each task's own expert."""

from __future__ import annotations

from typing import Any

from spectr.evaluation.experiments.setup import ExperimentSetup, Result
from spectr.evaluation.paired_statistics import in_words, mean_share
from spectr.evaluation.score import Measurement

_KS = (2, 4, 8)
_FAMILY = ("spectr", "spectr-paper", "spectr-projection", "spectr-code")
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("mu", {}),
    ("arrow", {"top_k": 4}),
    # With one expert, weights and combination make no difference.
    ("spectr", {"top_k": 1}),
    ("spectr-projection", {"top_k": 1}),
    *((name, {"top_k": k}) for name in _FAMILY for k in _KS),
    *((name, {"weights": "softmax", "top_k": k}) for name in _FAMILY for k in _KS),
    ("spectr", {"combine": "ties", "top_k": 4}),
    ("lag", {"shortlist": 3, "top_k": 1}),
    ("phatgoose", {}),
    ("glider", {}),
    ("glider-global", {}),
    ("glider-spectr", {}),
    ("calibrated-token", {"top_k": 1}),
    ("calibrated-token", {"top_k": 4}),
    ("calibrated-prior", {"top_k": 1}),
    ("calibrated", {"top_k": 2}),
    ("calibrated", {}),
]


def multitask(setup: ExperimentSetup) -> Result:
    """Multi-task accuracy normalised by the fine-tuned expert, for the base model, every router, and the oracle.

    Source: SpectR, Table 2.
    """
    tasks, own = setup.owned, setup.own_scores()
    found = {"base": {task: setup.scores(task, "base") for task in tasks}}
    methods: dict[str, dict[str, Any]] = {}
    for label, router in setup.routers(METHODS):
        found[label] = setup.scores_over_seeds(router, label)
        methods[label] = {"k": router.selection.k, "family": label.partition(", k ")[0]}
    found["its own expert"] = own
    seeds, rows = "", []
    if setup.seeds and setup.library.calibration is not None:
        seeds = f"Calibrated routers: mean over calibration seeds {', '.join(map(str, setup.seeds))}."
    for label, by_task in found.items():
        share = mean_share(by_task, own)
        accuracy = {task: Measurement.of(values) for task, values in by_task.items()}
        methods[label] = {
            "k": None,
            "family": label,
            **methods.get(label, {}),
            "share": share.value,
            "error": share.error,
            "accuracy": {task: m.value for task, m in accuracy.items()},
            "accuracy_error": {task: m.error for task, m in accuracy.items()},
        }
        rows.append([label, in_words(share), *(f"{accuracy[task].value:.1%}" for task in tasks)])
    return Result(
        name="multitask",
        title="One model for all tasks",
        source="SpectR, Table 2",
        columns=["method", "mean share of the own expert's accuracy", *tasks],
        rows=rows,
        data={"tasks": list(tasks), "methods": {label: methods[label] for label in found}},
        notes=[
            "Accuracy by task, and the mean over tasks of the accuracy divided by that of the task's own expert on the "
            "same examples. ± one standard error of that share, from the paired differences between method and expert. "
            f"{seeds}",
            *setup.left_out(METHODS),
            *setup.remarks(),
        ],
        origin=setup.origin(),
    )
