"""One model for all tasks: accuracy by router, as a share of the accuracy of each task's own expert."""

from __future__ import annotations

import math
from typing import Any

from spectr.evaluation.experiments.setup import ExperimentSetup, Result
from spectr.evaluation.paired_statistics import in_words, mean_share
from spectr.evaluation.score import Measurement
from spectr.selection import TopK

_MERGES: list[dict[str, Any]] = [{"combine": "raw-factors"}, {"combine": "factors"}, {}]  # the last: outputs
METHODS: list[tuple[str, dict[str, Any]]] = [
    # The paper's rows: one merge for all methods (section 3.3), weights 1 / k.
    *(("mu", merge) for merge in _MERGES),
    *(("arrow", {"weights": "uniform", **merge, "top_k": 4}) for merge in _MERGES),
    ("spectr", {"combine": "raw-factors", "top_k": 4}),  # the other merges are below
    # Arrow's own weights: a softmax of the scores.
    ("arrow", {"top_k": 4}),
    # By number of experts; with one, weights and combination make no difference.
    *(("spectr", {"top_k": k}) for k in (1, 2, 4, 8)),
    *(("spectr-paper", {"top_k": k}) for k in (2, 4, 8)),
    # The released code's score.
    ("spectr-projection", {"top_k": 1}),
    ("spectr-projection", {"top_k": 4}),
    ("spectr-code", {"top_k": 4}),
    # The paper's alternative weights.
    ("spectr", {"weights": "softmax", "top_k": 4}),
    ("spectr-paper", {"weights": "softmax", "top_k": 4}),
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
        about = {"k": router.selection.k, "family": label.partition(", k ")[0], "merge": router.combine}
        select = router.selection
        methods[label] = about | {"weights": select.weighting if isinstance(select, TopK) else "uniform"}
    found["its own expert"] = own
    seeds, rows = "", []
    if setup.seeds and setup.library.calibration is not None:
        seeds = f"Calibrated routers: mean over calibration seeds {', '.join(map(str, setup.seeds))}."
    for label, by_task in found.items():
        share = mean_share(by_task, own)
        accuracy = {task: Measurement.of(values) for task, values in by_task.items()}
        shares = {task: mean_share({task: by_task[task]}, {task: own[task]}) for task in tasks}
        methods[label] = {
            "k": None,
            "family": label,
            "merge": "",
            "weights": "",
            **methods.get(label, {}),
            "share": share.value,
            "error": share.error,
            "accuracy": {task: m.value for task, m in accuracy.items()},
            "accuracy_error": {task: m.error for task, m in accuracy.items()},
            "shares": {task: m.value for task, m in shares.items()},
        }
        row = methods[label]
        rows.append([label, row["merge"], row["weights"], in_words(share), *map(_normalised, shares.values())])
    reached = ", ".join(f"{task} {Measurement.of(values).value:.1%}" for task, values in own.items())
    return Result(
        name="multitask",
        title="One model for all tasks",
        source="SpectR, Table 2",
        columns=["method", "merge", "weights", "mean share of the own expert's accuracy", *tasks],
        rows=rows,
        data={"tasks": list(tasks), "methods": {label: methods[label] for label in found}},
        notes=[
            "Accuracy divided by that of the task's own expert on the same examples, by task and the mean over tasks. "
            "± one standard error of that share, from the paired differences between method and expert. "
            f"The own expert's accuracy: {reached}. {seeds}",
            _MERGE_NOTE,
            *setup.left_out(METHODS),
            *setup.remarks(),
        ],
        origin=setup.origin(),
    )


_MERGE_NOTE = (
    "Merge: what is averaged for a token. raw-factors: A and B of the adapters' files (the authors of mu and Arrow). "
    "factors: those of the SVD, A* = S V^T and B* = U (SpectR, eq. 10 to 12). outputs: what each expert adds (eq. 13)."
)


def _normalised(share: Measurement) -> str:
    return "-" if math.isnan(share.value) else f"{share.value:.1%}"
