"""What ``spectr evaluate`` was asked for: tasks, experts and experiments, read and checked before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spectr.errors import DataError, LibraryError, SpectrError, did_you_mean, raise_together

if TYPE_CHECKING:
    from spectr.library import ExpertLibrary
    from spectr.tasks import Example, Task

ORDER = (
    "quality",
    "similarity",
    "tokens",
    "routing",
    "ranks",
    "multitask",
    "heldout",
    "wording",
    "mixed",
    "robustness",
    "agreement",
    "costs",
)
COMPARING = frozenset(ORDER) - {"quality", "similarity", "agreement"}  # experiments that have routers to choose from
_RANKED = re.compile(r"(.+)-r(\d+)")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Everything that experiments are run on, beside the model.

    Attributes:
        experiments: Names, in the order to run.
        library: The experts.
        tasks: Each with its examples.
        reworded: By task the same examples in each of its paraphrases.
        held_out: As ``tasks``, of which the library has no expert.
        ranks: By rank a library of experts.
        companions: (case, expert, adapter folder) of each adapter that takes an expert's place.
        remarks: What was left out, and why.
    """

    experiments: Sequence[str]
    library: ExpertLibrary
    tasks: Mapping[str, tuple[Task, Sequence[Example]]]
    reworded: Mapping[str, Sequence[Sequence[Example]]]
    held_out: Mapping[str, tuple[Task, Sequence[Example]]]
    ranks: Mapping[int, ExpertLibrary]
    companions: Sequence[tuple[str, str, Path]]
    remarks: Sequence[str]

    @staticmethod
    def read(
        experiment: str,
        library: ExpertLibrary,
        *,
        tasks: Sequence[str],
        data_root: str | None,
        letters: bool,
        limit: int | None,
        ranks: Path | None,
        companions: Sequence[str],
    ) -> Asked:
        """Read and check it all.

        Raises:
            DataError: An unknown experiment, tasks that cannot be read, or an experiment that lacks what it needs.
            LibraryError: A task that was named, or a companion, belongs to an expert that the library does not have.
            AdapterError: An adapter of another rank, or a companion, cannot be used.
        """
        if experiment not in (*ORDER, "all"):
            raise DataError(f"unknown experiment '{experiment}'", do=did_you_mean(experiment, (*ORDER, "all")))
        if experiment == "heldout":
            return Asked(
                experiments=[experiment],
                library=library,
                tasks={},
                reworded={},
                held_out=_held_out(tasks, library, data_root, limit),
                ranks={},
                companions=(),
                remarks=(),
            )
        chosen = _tasks(tasks, letters)
        if tasks:
            _check_experts(chosen, library)
        chosen = [] if experiment in ("similarity", "costs") else chosen
        read = {about.name: (about, _examples(about, data_root, limit)) for about in chosen}
        reworded = {
            about.name: [_examples(about.reworded(i), data_root, limit) for i in range(len(about.paraphrases))]
            for about in chosen
        }
        owned = [name for name, (about, _) in read.items() if (about.expert or name) in library]
        if read and not owned:
            raise DataError(
                f"none of the tasks ({', '.join(read)}) belongs to an expert of {library.origin} "
                f"({', '.join(library.names)})",
                do="name a task file whose 'expert' is in the library",
            )
        idle = [name for name in read if name not in owned]
        remarks = [f"left out, as the library has no expert for them: {', '.join(idle)}"] if idle else []
        why = {"wording": _no_paraphrases(letters) if not any(reworded.values()) else None}
        why["mixed"] = None if len(owned) > 1 or not read else _ONE_TASK
        why["ranks"] = None if ranks else _NO_RANKS
        held_out: dict[str, tuple[Task, Sequence[Example]]] = {}
        if experiment == "all":
            try:
                held_out = _held_out((), library, data_root, limit)
            except SpectrError as error:
                why["heldout"] = (error.given, "")
        names: list[str] = [*ORDER] if experiment == "all" else [experiment]
        for name in [name for name in names if why.get(name)]:
            reason, do = why[name] or ("", "")
            if experiment == name:
                raise DataError(f"{name}: {reason}", do=do)
            remarks.append(f"{name} is left out: {reason}")
            names.remove(name)
        return Asked(
            experiments=names,
            library=library,
            tasks=read,
            reworded=reworded,
            held_out=held_out,
            ranks=_ranks(ranks) if ranks and "ranks" in names else {},
            companions=_companions(companions, library),
            remarks=remarks,
        )


_ONE_TASK = ("it asks two tasks at once, and there is one", "give more tasks whose experts are in the library")
_NO_RANKS = (
    "there are no experts of other ranks",
    "give --ranks FOLDER, with adapters named EXPERT-rRANK in it, such as sst2-r16 (spectr train --rank 16)",
)


def _no_paraphrases(letters: bool) -> tuple[str, str]:
    if letters:
        return "lettered options have no paraphrases", "leave out --letters"
    return "none of these tasks has paraphrases", "add 'paraphrases' to a task's file"


def _tasks(names: Sequence[str], letters: bool) -> list[Task]:
    from spectr.tasks import Task, shipped_tasks

    found = list(shipped_tasks().values())
    if names:
        found = [Task.load(name) if name.endswith((".yaml", ".yml")) else Task.shipped(name) for name in names]
    return [task.lettered() for task in found] if letters else found


def _held_out(
    names: Sequence[str], library: ExpertLibrary, root: str | None, limit: int | None
) -> dict[str, tuple[Task, Sequence[Example]]]:
    """The held-out tasks that were named, or those that come with the package and have no expert in the library."""
    from spectr.tasks import Task, heldout_tasks

    if names:
        tasks = [Task.load(name) if name.endswith((".yaml", ".yml")) else Task.shipped(name) for name in names]
    else:
        tasks = [task for task in heldout_tasks().values() if (task.expert or task.name) not in library]
    owned = [task.name for task in tasks if (task.expert or task.name) in library]
    if owned:
        raise DataError(
            f"{library.origin} has an expert of its own for {', '.join(owned)}",
            expected="tasks that no expert was trained on",
            do="name other tasks, or a library without these experts",
        )
    found, problems = {}, []
    for task in tasks:
        try:
            found[task.name] = (task, _examples(task, root, limit))
        except SpectrError as error:
            problems.append(error)
    raise_together("held-out tasks", problems, DataError)
    return found


def _check_experts(tasks: Sequence[Task], library: ExpertLibrary) -> None:
    """Raise :class:`LibraryError` unless the library has the expert of each task that was named."""
    absent = [
        LibraryError(
            f"task '{task.name}' belongs to the expert '{task.expert or task.name}', which {library.origin} does not "
            "have",
            expected=f"one of {', '.join(library.names)}",
            do=f"add it with spectr library add {task.expert or task.name} ADAPTER, or name another 'expert' in the "
            "task's file",
        )
        for task in tasks
        if (task.expert or task.name) not in library
    ]
    raise_together("tasks without an expert", absent, LibraryError)


def _examples(task: Task, root: str | None, limit: int | None) -> list[Example]:
    from spectr.tasks import data_source, read_examples

    source = data_source(task, "test", root)
    if source is None:
        raise DataError(f"task '{task.name}' names no test data", do="add 'test' to its file")
    return read_examples(task, source, root=root, limit=limit)


def _ranks(folder: Path) -> dict[int, ExpertLibrary]:
    """By rank a library of the adapters ``EXPERT-rRANK`` of a folder."""
    from spectr.library import ExpertLibrary

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


def _companions(given: Sequence[str], library: ExpertLibrary) -> list[tuple[str, str, Path]]:
    """Each ``EXPERT=FOLDER``; the adapters are read once, so that a bad one is told now."""
    found: list[tuple[str, str, Path]] = []
    problems: list[SpectrError] = []
    for text in given:
        name, _, folder = text.partition("=")
        if not (name and folder):
            problems.append(DataError(f"--companion {text}", expected="EXPERT=FOLDER"))
            continue
        try:
            library.check(name)
            library.without(name).with_expert(name, folder)
        except SpectrError as error:
            problems.append(error)
            continue
        found.append((f"{Path(folder).name} in place of {name}", name, Path(folder)))
    raise_together("companions that cannot be used", problems, DataError)
    return found
