"""Run a plan's experiments, store their results, and show the routers side by side."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectr.composition import Guide
from spectr.errors import DataError
from spectr.evaluation.evaluation_plan import Material, Plan
from spectr.evaluation.experiments import EXPERIMENTS, ExperimentSetup
from spectr.evaluation.experiments.setup import Progress, Result

_READERS = {
    "ranks": "ranks",
    "substitute": "robustness",
    "companion": "robustness",
}  # options that one experiment alone reads


def run_experiment(
    name: str,
    plan: Plan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
    seeds: int = 0,
    guide: Callable[[], Guide] | None = None,
    progress: Progress = lambda *_: None,
) -> Result:
    """Run one of a plan's experiments.

    Args:
        name: Name of the experiment.
        plan: What it needs.
        model: The base model.
        tokenizer: Its tokenizer.
        folder: For records from which an interrupted run resumes.
        seeds: Number of calibrations for calibrated routers; 0 for the library's own.
        guide: Makes a guide for routers that compare descriptions.
        progress: Called with (phase, done, total, remark).

    Raises:
        DataError: A task cannot be scored with this model, or a single experiment has no router left.
    """
    material = {field.name: getattr(plan, field.name) for field in dataclasses.fields(Material)}
    setup = ExperimentSetup(
        **material,
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        only=tuple(plan.routers),
        seeds=tuple(range(seeds)),
        guide=guide,
        progress=progress,
    )
    setup.check()
    result = EXPERIMENTS.load(name)(setup)
    if not result.rows and len(plan.experiments) == 1:
        reasons = [note for note in result.notes if note.startswith("Left out")]
        raise DataError(
            f"{name}: no router is left. {' '.join(reasons)}", do="add what is missing, or use other routers"
        )
    return result


def keep_result(result: Result, folder: Path, given: Mapping[str, Any]) -> tuple[Path, Path | None]:
    """Write a result with the command that reproduces it; a different run's result is renamed.

    Args:
        result: The result of :func:`run_experiment`.
        folder: The folder.
        given: The command's options by name.

    Returns:
        The file, and the new path of the other run's result, if any.
    """
    result = dataclasses.replace(result, origin={**result.origin, "command": _command(result.name, given)})
    path, before = folder / f"{result.name}.json", None
    if _replaces_other(path, result):
        before = path.replace(folder / f"{result.name}.before.json")
    return result.save(folder), before


def read_results(folder: Path) -> list[Result]:
    """The results of a folder, in the order of the experiments.

    Raises:
        DataError: There is none, or a file is no result.
    """
    found = [folder / f"{name}.json" for name in _in_order(folder)]
    if not found:
        raise DataError(f"{folder} holds no results", do="run spectr evaluate all first, with the same --out")
    results: list[Result] = []
    for path in found:
        try:
            results.append(Result.load(path))
        except (json.JSONDecodeError, TypeError) as error:
            raise DataError(
                f"{path} is not a result of spectr evaluate ({error})", do="delete it and run again"
            ) from error
    return results


def _in_order(folder: Path) -> list[str]:
    names = [*EXPERIMENTS.entries, *(name for name in EXPERIMENTS.names() if name not in EXPERIMENTS.entries)]
    return [name for name in names if (folder / f"{name}.json").is_file()]


def _command(experiment: str, given: Mapping[str, Any]) -> str:
    """The command that repeats this result; paths that exist are shortened to their last part."""
    words = ["spectr", "evaluate", experiment]
    for option, value in given.items():
        if not value or _READERS.get(option, experiment) != experiment:
            continue
        for one in value if isinstance(value, list) else [value]:
            name, equals, path = str(one).rpartition("=")
            last = Path(path).name if Path(path).exists() else path
            words += [f"--{option}"] if one is True else [f"--{option}", name + equals + (last or path)]
    return shlex.join(words)


def _replaces_other(path: Path, result: Result) -> bool:
    """Whether a result on disk is of other tasks, experts or settings."""
    if not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8"))["origin"] != json.loads(json.dumps(result.origin))
    except (json.JSONDecodeError, KeyError, TypeError):
        return True


_COLUMNS = ("routing", "first"), ("wording", "first"), ("wording", "two"), ("multitask", "share"), ("wording", "share")
_HEADINGS = (
    "router",
    "finds the right expert",
    "in other words",
    "among the first two",
    "accuracy, share of the right expert's",
    "the same in other words",
    "most that an unusual expert took",
)


def summary(results: Sequence[Result]) -> Result | None:
    """Routers that "routing" measured, with the other experiments' results; ``None`` without "routing"."""
    found = {result.name: result for result in results}
    if "routing" not in found:
        return None
    routed, others = found["routing"].data.get("summary", {}), (("multitask", "share"), ("wording", "first"))
    compared = [name for name in routed if any(_value(found, kind, name, what) for kind, what in others)]
    rows = []
    for router in compared or routed:
        cells = [_cell(_value(found, experiment, router, what)) for experiment, what in _COLUMNS]
        rows.append([router, *cells, _taken(found, router)])
    used = [name for name in ("routing", "wording", "multitask", "robustness") if name in found]
    notes = [
        f"From the experiments below: {', '.join(used)}. ± one standard error; for a router with several calibration "
        "seeds, the mean over them. Shares of accuracy compare with the right expert on the same examples; their error "
        "is that of the difference.",
        *[note for name in ("routing", "wording") if name in found for note in found[name].notes if " seed" in note],
    ]
    setups = {name: (found[name].origin.get("experts"), found[name].origin.get("model")) for name in used}
    if len({str(setup) for setup in setups.values()}) > 1:
        notes.insert(0, "Warning: these experiments ran with different experts or models.")
    return Result(
        name="summary",
        title="The routers side by side",
        source="prompts, in percent",
        columns=_HEADINGS,
        rows=rows,
        notes=notes,
        origin={"commands": [found[name].origin.get("command", "") for name in used]},
    )


def tradeoff(results: Sequence[Result]) -> Result | None:
    """Quality against cost, held-in and held-out, of the routers that "costs" and "multitask" both measured."""
    found = {result.name: result for result in results}
    if not {"costs", "multitask"} <= set(found):
        return None
    costs, held_in = found["costs"].data, found["multitask"].data["methods"]
    held_out = found["heldout"].data["methods"] if "heldout" in found else {}
    points, rows = {}, []
    for label, cost in costs["routers"].items():
        if label not in held_in:
            continue
        inside, outside = held_in[label], held_out.get(label)
        points[label] = {
            "cost": cost["flops"] / costs["base"],
            "held_in": [inside["share"], inside["error"]],
            "held_out": [outside["gain"], outside["error"]] if outside else None,
        }
        gained = f"{100 * outside['gain']:+.1f} ± {100 * outside['error']:.1f}" if outside else ""
        share = _cell((inside["share"], inside["error"]))
        rows.append([label, f"{points[label]['cost']:.1%}", share, gained])
    used = [name for name in ("costs", "multitask", "heldout") if name in found]
    headings = ("router", "arithmetic added to a token", "held-in, share of the own expert's accuracy")
    return Result(
        name="tradeoff",
        title="Quality against cost",
        source="from the experiments below",
        columns=[*headings, "held-out, points over the base model"],
        rows=rows,
        data={"points": points, "base": held_in["base"]["share"]},
        notes=[
            "Arithmetic per token of an answer, as a share of the base model's. Work before an answer (the calibrated "
            "routers' probe, GLIDER's instruction) is in 'costs'. ± one standard error. In the picture, equal costs "
            "are side by side."
        ],
        origin={"commands": [found[name].origin.get("command", "") for name in used]},
    )


def _value(found: Mapping[str, Result], experiment: str, router: str, what: str) -> tuple[float, float] | None:
    if experiment not in found:
        return None
    data = found[experiment].data
    if experiment == "multitask":
        method = data["methods"].get(router)
        return (method["share"], method["error"]) if method else None
    values = data["summary"].get(router, {}).get(what)
    return tuple(values) if values else None


def _taken(found: Mapping[str, Result], router: str) -> str:
    cases = found["robustness"].data["cases"].values() if "robustness" in found else ()
    shares = [case[router]["stolen"] for case in cases if router in case]
    return f"{max(shares):.1%}" if shares else ""


def _cell(value: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return "100%" if tuple(value) == (1.0, 0.0) else f"{value[0]:.1%} ± {value[1]:.1%}"
