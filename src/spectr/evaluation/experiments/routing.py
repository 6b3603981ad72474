"""Does each router find the right expert: for tokens, among the first four, and for whole prompts."""

from __future__ import annotations

from typing import Any

from spectr.evaluation.experiments.setup import ExperimentSetup, Result, SideTable, percent, seeds_note
from spectr.evaluation.experiments.similarity import cosines, mean_cosines, mean_with_others
from spectr.evaluation.expert_recall import over_runs

ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("arrow", {"top_k": 4}),
    ("spectr", {"top_k": 4}),
    ("spectr-projection", {"top_k": 4}),
    ("lag", {"shortlist": 3, "top_k": 1}),
    ("phatgoose", {}),
    ("glider", {}),
    ("calibrated-token", {"top_k": 1}),
    ("calibrated", {}),
]


def routing(setup: ExperimentSetup) -> Result:
    """Top-1 and top-4 routing accuracy per task and router, and against the similarity of tasks.

    Source: SpectR, Tables 1 and 4, Figure 5.
    """
    tasks, names, notes = setup.owned, setup.library.names, []
    rows, per_task, winners, summary = [], {}, {}, {}
    by_task: dict[str, list[list[str]]] = {"top_4": [], "top_1": []}
    for label, router in setup.routers(ROUTERS):
        runs = setup.find_over_seeds(router, f"routing: {label}")
        measured = {what: over_runs(runs, value) for what, value in _VALUES.items()}
        rows.append([label, *map(percent, (*measured.values(), over_runs(runs, lambda finding: finding.to_base)))])
        summary[label] = {what: [m.value, m.error] for what, m in measured.items()}
        notes += seeds_note(label, runs, setup)
        per_task[label] = {
            task: {what: over_runs(runs, value, [task]).value for what, value in _VALUES.items()} for task in tasks
        }
        for what, table in by_task.items():
            each = [over_runs(runs, _VALUES[what], [task]) for task in tasks]
            table.append([label, *map(percent, (*each, measured[what]))])
        winners[label] = {
            task: {name: over_runs(runs, lambda f, name=name: f.winner == name, [task]).value for name in names}
            for task in tasks
        }
    count = len(names)
    similar = mean_with_others(mean_cosines(cosines(setup.library)))
    return Result(
        name="routing",
        title="Which router finds the right expert",
        source="SpectR, Tables 1 and 4, Figure 5",
        columns=[
            "router",
            "tokens, first",
            "tokens, first four",
            "prompts, by vote",
            "prompts, first two",
            "to the base",
        ],
        rows=rows,
        data={
            "tasks": list(tasks),
            "experts": list(names),
            "summary": summary,
            "per_task": per_task,
            "winners": winners,
            "similarity": {task: float(similar[names.index(setup.expert_of(task))]) for task in tasks},
        },
        more=[
            SideTable(title=f"{title}, by task", columns=["router", *tasks, "all"], rows=by_task[what])
            for what, title in _BY_TASK.items()
        ],
        notes=[
            f"By chance: {1 / count:.1%} first, {min(4, count) / count:.1%} among four, {min(2, count) / count:.1%} "
            "among two.",
            _NOTE,
            *notes,
            *setup.left_out(ROUTERS),
            *setup.remarks(),
        ],
        origin=setup.origin(),
    )


_NOTE = (
    "Tokens: mean over a prompt's tokens after the chat template's opening and over all modules, then over prompts. "
    "Prompts: the expert that is first most often over all tokens and modules. 'calibrated' decides once for the "
    "prompt, by its evidence. To base: prompts that the base model answers with the default of 'abstain'; in the other "
    "columns an expert always answers. ± one standard error over prompts."
)
_BY_TASK = {
    "top_4": "Right expert among the first four, tokens and modules (Table 1)",
    "top_1": "Right expert first, tokens and modules (Table 4)",
}
_VALUES: dict[str, Any] = {
    "top_1": lambda finding: finding.top_1,
    "top_4": lambda finding: finding.top_4,
    "first": lambda finding: finding.place == 1,
    "two": lambda finding: finding.place <= 2,
}
