"""Held-out tasks: the value of a library on tasks that none of its experts was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from spectr.errors import DataError
from spectr.evaluation.experiments.setup import ExperimentSetup, Result, percent
from spectr.evaluation.paired_statistics import mean_difference
from spectr.evaluation.score import Measurement
from spectr.routers import Oracle

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("mu", {}),
    ("arrow", {"top_k": 4}),
    ("spectr", {"top_k": 4}),
    ("lag", {"shortlist": 3, "top_k": 1}),
    ("phatgoose", {}),
    ("glider", {}),
    ("calibrated-prior", {"top_k": 1}),
    ("calibrated", {}),
]
Scores = Mapping[str, Sequence[float]]


def heldout(setup: ExperimentSetup) -> Result:
    """Zero-shot accuracy of the base model, the routers, and the best single expert chosen in hindsight.

    Source: the setting of PHATGOOSE (Muqeeth et al., 2024), section 4; the tasks are ours.
    """
    if not setup.held_out:
        raise DataError("no held-out tasks were given", do="spectr evaluate heldout --task FILE, or --data-root DATA")
    setup = dataclasses.replace(setup, tasks=setup.held_out, ownerless=True, reworded={})
    tasks, experts = list(setup.tasks), setup.library.names
    base = {task: setup.scores(task, "base") for task in tasks}
    found: dict[str, Scores] = {"base": base}
    for label, router in setup.routers(METHODS):
        found[label] = setup.scores_over_seeds(router, label)
    alone: dict[str, Scores] = {}
    for expert in experts:
        with setup.routed(Oracle(expert=expert)) as routed:
            alone[expert] = {task: setup.scores(task, f"{expert} alone", routed) for task in tasks}
    best = {task: max(experts, key=lambda expert, task=task: sum(alone[expert][task])) for task in tasks}
    single = max(experts, key=lambda expert: sum(sum(alone[expert][task]) / len(base[task]) for task in tasks))
    found[f"best single expert in hindsight ({single})"] = alone[single]
    found["best expert of each task in hindsight"] = {task: alone[best[task]][task] for task in tasks}
    means = {name: {task: sum(s) / len(s) for task, s in scores.items()} for name, scores in alone.items()}
    rows, methods = [], {}
    for label, scores in found.items():
        methods[label] = row = _compared(scores, base)
        points = "" if label == "base" else f"{100 * row['gain']:+.1f} ± {100 * row['error']:.1f}"
        accuracy = [percent(Measurement.of(scores[task])) for task in tasks]
        rows.append([label, f"{row['mean']:.1%}", points, *accuracy])
    return Result(
        name="heldout",
        title="Tasks that no expert was trained on",
        source="the setting of PHATGOOSE, section 4",
        columns=["method", "mean accuracy", "points over the base model", *tasks],
        rows=rows,
        data={"tasks": tasks, "methods": methods, "experts_alone": means, "best": best},
        notes=[
            "Zero-shot. ± one standard error over examples; for points over the base model, of the differences per "
            "example. In hindsight: the experts that were best on exactly these examples, which nobody can know in "
            "advance. With nine experts, the best one is favoured by chance. "
            f"Best by task: {', '.join(f'{task} {expert}' for task, expert in best.items())}.",
            *setup.left_out(METHODS),
            *setup.remarks(),
        ],
        origin=setup.origin(),
    )


def _compared(scores: Scores, base: Scores) -> dict[str, Any]:
    """A method's accuracies, their mean, and what it gains over the base model."""
    gain = mean_difference(scores, base)
    accuracy = {task: Measurement.of(scores[task]).value for task in base}
    mean = sum(accuracy.values()) / len(accuracy)
    return {"mean": mean, "gain": gain.value, "error": gain.error, "accuracy": accuracy}
