"""What to evaluate: tasks, experts, experiments and routers, read and checked before a model is loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from spectr.choosing import check_names, problems_of
from spectr.errors import (
    CompositionError,
    DataError,
    LibraryError,
    SpectrError,
    did_you_mean,
    map_together,
    raise_together,
)
from spectr.evaluation.experiments import EXPERIMENTS
from spectr.library import ExpertLibrary
from spectr.library.needs import AtMost
from spectr.renamed import old_attribute
from spectr.routers import get_router
from spectr.routers.registries import ROUTERS
from spectr.routers.setting_texts import read_settings
from spectr.tasks import Example, Task

Tasks = Mapping[str, tuple[Task, Sequence[Example]]]
ORDER = tuple(EXPERIMENTS.entries)  # of "all"
COMPARES_NONE = frozenset({"quality", "similarity", "agreement"})  # experiments that have no routers to choose from
_RANKED = re.compile(r"(.+)-r(\d+)")


@dataclass(frozen=True, kw_only=True)
class Material:
    """What experiments work on, apart from the model.

    Attributes:
        library: The experts.
        tasks: The tasks, each with its examples.
        reworded: By task, the same examples in each of its paraphrases.
        held_out: Like ``tasks``, but the library has no expert for them; for "heldout".
        ranks: By rank, a library of the same tasks' experts.
        substitutes: Adapters that replace experts in "robustness": (case, expert, folder).
        settings: Settings of the routers, ``NAME=VALUE``; see :func:`spectr.routers.setting_texts.read_settings`.
    """

    library: ExpertLibrary
    tasks: Tasks = field(default_factory=dict)
    reworded: Mapping[str, Sequence[Sequence[Example]]] = field(default_factory=dict)
    held_out: Tasks = field(default_factory=dict)
    ranks: Mapping[int, ExpertLibrary] = field(default_factory=dict)
    substitutes: Sequence[tuple[str, str, Path]] = ()
    settings: Sequence[str] = ()

    companions = old_attribute("companions", "substitutes")


@dataclass(frozen=True, kw_only=True)
class Plan(Material):
    """Everything that experiments need, except the model.

    Attributes:
        experiments: Names, in the order to run.
        routers: Names of the routers to compare; if empty, all routers of an experiment.
        remarks: What was left out, and why.
    """

    experiments: Sequence[str]
    routers: Sequence[str] = ()
    remarks: Sequence[str] = ()


def read_plan(
    experiment: str,
    library: ExpertLibrary,
    *,
    tasks: Sequence[str] = (),
    data_root: str | None = None,
    letters: bool = False,
    limit: int | None = None,
    ranks: Path | None = None,
    substitutes: Sequence[str] = (),
    routers: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> Plan:
    """Read and check everything.

    Args:
        experiment: A name of :data:`EXPERIMENTS`, or "all".
        library: The experts.
        tasks: Names of shipped tasks, or task files; by default all shipped tasks.
        data_root: Folder for relative paths of data, or "hub".
        letters: List the options with letters.
        limit: Maximum number of examples per task.
        ranks: For "ranks": a folder of adapters ``EXPERT-rRANK``.
        substitutes: For "robustness": each ``EXPERT=FOLDER``.
        routers: Names of the routers to compare; if empty, all routers of an experiment.
        settings: Settings of the routers, ``NAME=VALUE``.

    Raises:
        DataError: An unknown experiment, routers that cannot be compared, tasks that cannot be read, or an experiment
            that lacks what it needs.
        CompositionError: A setting is unknown, or its value is out of range.
        LibraryError: A named task, or a substitute, belongs to an expert that the library does not have.
        AdapterError: An adapter of another rank, or a substitute, cannot be used.
    """
    known = (*EXPERIMENTS.names(), "all")
    if experiment not in known:
        raise DataError(f"unknown experiment '{experiment}'", do=did_you_mean(experiment, known))
    _ = library.calibration  # a damaged one is found now
    _check_routers(experiment, routers, settings, library)
    _check_options(experiment, ranks, substitutes)
    plan = Plan(
        experiments=[experiment],
        library=library,
        routers=routers,
        settings=settings,
        ranks=_ranks(ranks) if ranks else {},
        substitutes=_substitutes(substitutes, library),
    )
    if experiment == "heldout":
        return replace(plan, held_out=_held_out(tasks, library, data_root, limit))
    chosen = _tasks(tasks, letters)
    if tasks:
        _check_experts(chosen, library)
    read, reworded = _read([] if experiment in ("similarity", "costs") else chosen, data_root, limit)
    owned = _owned(read, library)
    lacks = {
        "wording": None if any(reworded.values()) else _no_paraphrases(letters),
        "mixed": None if len(owned) > 1 or not read else _ONE_TASK,
        "ranks": None if ranks else _NO_RANKS,
    }
    plan = replace(plan, tasks=read, reworded=reworded)
    if experiment == "all":
        try:
            plan = replace(plan, held_out=_held_out((), library, data_root, limit))
        except SpectrError as error:
            lacks["heldout"] = (error.given, "")
    names, left_out = _possible(experiment, lacks)
    idle = [name for name in read if name not in owned]
    remarks = [f"left out, since the library has no expert for them: {', '.join(idle)}"] if idle else []
    return replace(plan, experiments=names, remarks=[*remarks, *left_out])


def _read(chosen: Sequence[Task], root: str | None, limit: int | None) -> tuple[Tasks, dict[str, list[list[Example]]]]:
    """Tasks with their examples, and the same examples in each paraphrase."""
    read = {about.name: (about, _examples(about, root, limit)) for about in chosen}
    reworded = {
        about.name: [_examples(about.reworded(i), root, limit) for i in range(len(about.paraphrases))]
        for about in chosen
    }
    return read, reworded


def _check_options(experiment: str, ranks: Path | None, substitutes: Sequence[str]) -> None:
    """Raise for options that the experiment does not read, and for one that it needs."""
    for option, value, reader in (("--ranks", ranks, "ranks"), ("--substitute", substitutes, "robustness")):
        if value and experiment not in (reader, "all"):
            raise DataError(f"{option} is for the experiment {reader}", do="remove it")
    if experiment == "ranks" and not ranks:
        raise DataError(f"ranks: {_NO_RANKS[0]}", do=_NO_RANKS[1])


def _check_routers(experiment: str, names: Sequence[str], settings: Sequence[str], library: ExpertLibrary) -> None:
    """Raise for routers or settings that the experiment does not use, and for routers that cannot be compared."""
    if (names or settings) and experiment in COMPARES_NONE:
        raise DataError(f"{experiment} compares no routers", do="remove --router and --set")
    if settings and not names:
        raise DataError(f"--set {settings[0]} without a router", do="name its routers: --router NAME")
    check_names(names)
    title = "these routers cannot be compared"
    raise_together(title, problems_of(ROUTERS.load, names), DataError)
    given, made = read_settings(settings, names), {}

    def make(name: str) -> None:
        try:
            made[name] = get_router(name, **given[name])
        except SpectrError as error:
            own = "remove it; 'quality' measures each task's own expert"
            do = own if name == "oracle" else error.do
            raise DataError(f"router '{name}': {error.given}", expected=error.expected, do=do) from error

    raise_together(title, problems_of(make, names), DataError)
    if experiment == "ranks":  # which calibrates the experts of each rank itself
        return

    def check(name: str) -> None:
        for need in made[name].needs:
            if not isinstance(need, AtMost):  # the experiment may set another top_k
                need.check(library, library.names)

    lacks = problems_of(check, names)
    if len(lacks) == len(names):
        raise_together(title, lacks, CompositionError)


def _owned(read: Tasks, library: ExpertLibrary) -> list[str]:
    """The tasks whose expert is in the library: at least one, where there are tasks."""
    owned = [name for name, (about, _) in read.items() if (about.expert or name) in library]
    if read and not owned:
        raise DataError(
            f"none of the tasks ({', '.join(read)}) belongs to an expert of {library.origin} "
            f"({', '.join(library.names)})",
            do="use a task file whose 'expert' is in the library",
        )
    return owned


def _possible(experiment: str, lacks: Mapping[str, tuple[str, str] | None]) -> tuple[list[str], list[str]]:
    """The experiments to run, and a remark on each of "all" that lacks what it needs."""
    names: list[str] = [*ORDER] if experiment == "all" else [experiment]
    remarks = []
    for name, lack in lacks.items():
        if lack is None or name not in names:
            continue
        reason, do = lack
        if experiment == name:
            raise DataError(f"{name}: {reason}", do=do)
        remarks.append(f"{name} is left out: {reason}")
        names.remove(name)
    return names, remarks


_ONE_TASK = ("it needs two tasks, but there is one", "add tasks whose experts are in the library")
_NO_RANKS = (
    "there are no experts of other ranks",
    "use --ranks FOLDER, which holds adapters named EXPERT-rRANK, such as sst2-r16 (spectr train --rank 16)",
)


def _no_paraphrases(letters: bool) -> tuple[str, str]:
    if letters:
        return "lettered options have no paraphrases", "remove --letters"
    return "none of these tasks has paraphrases", "add 'paraphrases' to a task's file"


def _named(names: Sequence[str]) -> list[Task]:
    found = [Task.load(name) if name.endswith((".yaml", ".yml")) else Task.shipped(name) for name in names]
    for name, count in Counter(task.name for task in found).items():
        if count > 1:
            raise DataError(f"two tasks have the name '{name}'", expected="different names", do="remove one")
    return found


def _tasks(names: Sequence[str], letters: bool) -> list[Task]:
    from spectr.tasks import shipped_tasks

    found = _named(names) or list(shipped_tasks().values())
    return [task.lettered() for task in found] if letters else found


def _held_out(
    names: Sequence[str], library: ExpertLibrary, root: str | None, limit: int | None
) -> dict[str, tuple[Task, Sequence[Example]]]:
    """The held-out tasks that were named, or those that come with the package and have no expert in the library."""
    from spectr.tasks import heldout_tasks

    tasks = _named(names) or [task for task in heldout_tasks().values() if (task.expert or task.name) not in library]
    owned = [task.name for task in tasks if (task.expert or task.name) in library]
    if owned:
        raise DataError(
            f"{library.origin} has an expert for {', '.join(owned)}",
            expected="tasks that no expert was trained on",
            do="use other tasks, or a library without these experts",
        )
    read = map_together("held-out tasks", lambda task: (task, _examples(task, root, limit)), tasks, DataError)
    return {task.name: (task, examples) for task, examples in read}


def _check_experts(tasks: Sequence[Task], library: ExpertLibrary) -> None:
    """Raise :class:`LibraryError` unless the library has the expert of each task that was named."""
    absent = [
        LibraryError(
            f"task '{task.name}' belongs to the expert '{task.expert or task.name}', which is not in {library.origin}",
            expected=f"one of {', '.join(library.names)}",
            do=f"add it with spectr library add {task.expert or task.name} ADAPTER, or change 'expert' in the task",
        )
        for task in tasks
        if (task.expert or task.name) not in library
    ]
    raise_together("tasks without an expert", absent, LibraryError)


def _examples(task: Task, root: str | None, limit: int | None) -> list[Example]:
    from spectr.tasks import data_source, read_examples

    source = data_source(task, "test", root)
    if source is None:
        raise DataError(f"task '{task.name}' has no test data", do="add 'test' to its file")
    return read_examples(task, source, root=root, limit=limit)


def _ranks(folder: Path) -> dict[int, ExpertLibrary]:
    """By rank a library of the adapters ``EXPERT-rRANK`` of a folder."""
    found: dict[int, dict[str, str]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _RANKED.fullmatch(path.name)
        if match and (path / "adapter_config.json").is_file():
            found.setdefault(int(match[2]), {})[match[1]] = str(path)
    if not found:
        raise DataError(f"{folder} holds no adapters named EXPERT-rRANK, such as sst2-r16", do=_NO_RANKS[1])
    experts = set.union(*map(set, found.values()))
    gaps = [f"{name}-r{rank}" for rank, paths in sorted(found.items()) for name in sorted(experts - set(paths))]
    if gaps:
        raise DataError(f"{folder} lacks {', '.join(gaps)}", expected="every expert at every rank", do=_NO_RANKS[1])
    return {rank: ExpertLibrary.from_adapters(paths) for rank, paths in sorted(found.items())}


def _substitutes(given: Sequence[str], library: ExpertLibrary) -> list[tuple[str, str, Path]]:
    """Each ``EXPERT=FOLDER``; the adapters are read once, so that a bad one is found now."""

    def substitute(text: str) -> tuple[str, str, Path]:
        name, _, folder = text.partition("=")
        if not (name and folder):
            raise DataError(f"--substitute {text}", expected="EXPERT=FOLDER")
        library.check(name)
        library.without(name).with_expert(name, folder)
        return f"{Path(folder).name} in place of {name}", name, Path(folder)

    return map_together("these substitutes cannot be used", substitute, given, DataError)
