"""Run a plan's experiments, and store their results."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectr.composition import Guide
from spectr.errors import DataError
from spectr.evaluation.experiments import EXPERIMENTS, ExperimentSetup, Result
from spectr.evaluation.experiments.setup import Progress
from spectr.evaluation.plan import Plan

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
    setup = ExperimentSetup(
        model=model,
        tokenizer=tokenizer,
        library=plan.library,
        tasks=plan.tasks,
        reworded=plan.reworded,
        folder=folder,
        only=tuple(plan.routers),
        settings=tuple(plan.settings),
        seeds=tuple(range(seeds)),
        ranks=plan.ranks,
        companions=plan.companions,
        held_out=plan.held_out,
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
    """What gives this result again; of folders and files that exist only the last part of their path."""
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
