"""Shared by experiments: their setup, and the form of their results."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectr.adapters import GATES_FILE
from spectr.calibration import calibrate
from spectr.composition import Guide, Routed, compose
from spectr.errors import CompositionError, DataError, SpectrError, collecting, raise_together
from spectr.evaluation.choices import encode_examples
from spectr.evaluation.evaluation_plan import Material
from spectr.evaluation.expert_recall import Finding, find_experts, keep_findings, kept_findings, over_runs
from spectr.evaluation.score import Measurement, counting, score_examples, score_of, text_metric
from spectr.folders import with_parents
from spectr.grouping import grouped
from spectr.hashing import json_sha256, known_sha256, package_versions
from spectr.library import Calibration, ExpertLibrary
from spectr.library.needs import CALIBRATED, DESCRIBED, GATED, NORMED
from spectr.models import context_length, opening_length
from spectr.routers import Oracle, Router, first_lack, get_router
from spectr.routers.abstention import always_choosing
from spectr.routers.router_config import router_config
from spectr.routers.setting_texts import read_settings
from spectr.tasks import Example, Task

Progress = Callable[[str, int, int, str], None]
Compared = Sequence[tuple[str, Mapping[str, Any]]]  # names of routers, each with its settings


@dataclass(frozen=True, kw_only=True)
class SideTable:
    """A further table of an experiment.

    Attributes:
        title: What it shows.
        columns: Headings.
        rows: Its cells.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One experiment's result: tables for people and all data for plots, in JSON types.

    Attributes:
        name: The experiment.
        title: A heading.
        source: Its place in the paper.
        columns: Headings of the table.
        rows: Cells: texts and numbers.
        data: Data of the plot.
        notes: Notes for the reader.
        origin: Model, experts, data, versions, seeds.
        more: Further tables of the same experiment.
    """

    name: str
    title: str
    source: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)
    more: Sequence[SideTable] = ()

    def save(self, folder: Path) -> Path:
        """Write ``NAME.json`` into a folder."""
        path = with_parents(folder / f"{self.name}.json")
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    @staticmethod
    def load(path: Path) -> Result:
        """Read a file of :meth:`save`."""
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Result(**{**kept, "more": [SideTable(**table) for table in kept.get("more", ())]})


@dataclass(frozen=True, kw_only=True)
class ExperimentSetup(Material):
    """The base model, experts and tasks of an experiment.

    Attributes:
        model: The base model, not composed; experiments leave it so.
        tokenizer: Its tokenizer.
        folder: For records from which an interrupted run resumes.
        only: Names of the routers to compare; if empty, all routers of an experiment.
        seeds: Seeds of calibrations for calibrated routers; if empty, the library's own calibration.
        ownerless: Whether the library may lack an expert for some ``tasks``.
        guide: Makes a guide for routers that compare descriptions; called once.
        progress: Called with (phase, done, total, remark).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    only: Sequence[str] = ()
    seeds: Sequence[int] = ()
    ownerless: bool = False
    guide: Callable[[], Guide] | None = None
    progress: Progress = lambda *_: None

    @property
    def owned(self) -> dict[str, tuple[Task, Sequence[Example]]]:
        """The tasks whose expert is in the library; all of them, where they need none."""
        if self.ownerless:
            return dict(self.tasks)
        return {name: pair for name, pair in self.tasks.items() if (pair[0].expert or name) in self.library}

    def paraphrased(self) -> ExperimentSetup:
        """This setup with every example in one of its task's paraphrases, in turn."""
        tasks = {
            name: (task, [self.reworded[name][i % len(self.reworded[name])][i] for i in range(len(examples))])
            for name, (task, examples) in self.tasks.items()
            if self.reworded.get(name)
        }
        return dataclasses.replace(self, tasks=tasks)

    def expert_of(self, task: str) -> str:
        """The expert that belongs to a task."""
        return self.tasks[task][0].expert or task

    @contextmanager
    def routed(self, router: Router) -> Iterator[Routed]:
        """The model composed while the block runs."""
        guide = self.guide() if self.guide is not None and DESCRIBED in router.needs else None
        routed = compose(self.model, self.library, router, guide=guide)
        try:
            yield routed
        finally:
            routed.remove()

    def routers(self, compared: Compared) -> list[tuple[str, Router]]:
        """Labelled routers, without those that lack something (:meth:`left_out`).

        Args:
            compared: The experiment's routers. Routers that only :attr:`only` names have no settings.
        """
        return [(label, router) for label, router, lack in self._compared(compared) if lack is None]

    def left_out(self, compared: Compared) -> list[str]:
        """Remarks on the omitted routers and what the library lacks for them."""
        found = grouped((lack, label) for label, _, lack in self._compared(compared) if lack is not None)
        return [f"Left out for lack of {lack}: {'; '.join(labels)}." for lack, labels in found.items()]

    def _compared(self, compared: Compared) -> Iterator[tuple[str, Router, str | None]]:
        """Label, router and what is lacking for it, each label once; the settings of this setup win."""
        known = {name for name, _ in compared}
        chosen = [pair for pair in compared if not self.only or pair[0] in self.only]
        chosen += [(name, {}) for name in self.only if name not in known]
        given = read_settings(self.settings, [name for name, _ in chosen], strict=False)
        pairs = [(name, {**own, **given[name]}) for name, own in chosen]
        for label, (name, options) in {_label(*pair): pair for pair in pairs}.items():
            router = get_router(name, **options)
            router = router if "abstain" in options else always_choosing(router)  # routing is compared, not abstention
            lack = first_lack(router, self.library, self.library.names)
            unguided = DESCRIBED if DESCRIBED in router.needs and self.guide is None else None
            need = lack[0] if lack else unguided
            yield label, router, need.lacking if need else None

    def find(self, routed: Routed, phase: str) -> dict[str, list[Finding]]:
        """By task, for each prompt, whether the model in its current routing finds the task's expert.

        Results of an interrupted run are reused.
        """
        found = {}
        for done, (task, (_, examples)) in enumerate(self.owned.items(), start=1):
            prompts = [example.prompt for example in examples]
            expert = self.expert_of(task)
            path = self.folder / "records" / f"{task}--{phase.replace(':', '')}.json"
            made_of = {**self.origin(), **self._needed_by(routed), "expert": expert, "prompts": prompts, "ratio": True}
            made_of |= {"p": True} if routed.policy is not None and routed.policy.evidence.knows_p else {}
            kept = kept_findings(path, made_of, {**made_of, "router": str(routed.router)})
            if kept is None:
                kept = find_experts(self.model, routed, self.tokenizer, prompts, expert, skip=self.opening)
                keep_findings(path, made_of, kept)
            found[task] = kept
            self.progress(phase, done, len(self.owned), task)
        return found

    @property
    def opening(self) -> int:
        """Number of tokens that the chat template puts before every prompt."""
        return opening_length(self.tokenizer)

    def find_over_seeds(self, router: Router, phase: str) -> list[dict[str, list[Finding]]]:
        """As :meth:`find`, once; of a calibrated router once for each of the seeds."""
        return [setup.find(routed, phase) for setup, routed in self._over_seeds(router)]

    def scores_over_seeds(self, router: Router, method: str) -> dict[str, list[float]]:
        """By task each example's score; of a calibrated router its mean over the seeds."""
        runs = [
            {task: setup.scores(task, method, routed) for task in self.owned}
            for setup, routed in self._over_seeds(router)
        ]
        return {
            task: [sum(values) / len(values) for values in zip(*(run[task] for run in runs), strict=True)]
            for task in self.owned
        }

    def _over_seeds(self, router: Router) -> Iterator[tuple[ExperimentSetup, Routed]]:
        for setup in self._calibrations(router):
            with setup.routed(router) as routed:
                yield setup, routed

    def _calibrations(self, router: Router) -> Iterator[ExperimentSetup]:
        """This setup as it is; for a calibrated router with the calibration of each seed, which are kept."""
        if not self.seeds or CALIBRATED not in router.needs:
            yield self
            return
        for seed in self.seeds:
            folder = self.folder / f"calibration-seed-{seed}"
            own, kept = self.library.calibration, Calibration.load(folder)
            if own is not None and own.settings.get("seed") == seed:
                kept = own
            elif kept is None or not all(kept.covers(self.library[name]) for name in self.library):
                kept = self.calibration_of(self.library, f"calibrating, seed {seed}", seed=seed, fresh=True)
                folder.mkdir(parents=True, exist_ok=True)
                kept.save(folder)
            yield dataclasses.replace(self, library=self.library.with_calibration(kept), folder=folder)

    def calibration_of(self, library: ExpertLibrary, phase: str, **options: Any) -> Calibration:
        """A library's calibration with this model; see :func:`spectr.calibrate`."""
        return calibrate(
            self.model,
            library,
            self.tokenizer,
            progress=lambda done, total: self.progress(phase, done, total, ""),
            **options,
        )

    def own_scores(self, method: str = "its own expert") -> dict[str, list[float]]:
        """By task, each example's score with only the task's own expert."""
        found = {}
        for task in self.owned:
            with self.routed(Oracle(expert=self.expert_of(task))) as routed:
                found[task] = self.scores(task, method, routed)
        return found

    def scores(self, task: str, method: str, routed: Routed | None = None) -> list[float]:
        """Each example's score with the model as it is now; reuses scores of an interrupted run."""
        about, examples = self.tasks[task]
        origin = {**self.origin(), **self._needed_by(routed), "task": about.version}
        records = score_examples(
            self.model,
            self.tokenizer,
            examples,
            metric=about.metric,
            length_normalised=about.length_normalised,
            max_new_tokens=about.max_new_tokens,
            decision=routed.prompt if routed else None,
            keep=self.folder / "records" / f"{task}{_form(about)}--{method}.jsonl",
            origin=origin,
            former={**origin, "router": str(routed.router)} if routed else None,
            name=task,
            progress=counting(self.progress, f"{task}: {method}", len(examples)),
        )
        return [score_of(record) for record in records]

    def _needed_by(self, routed: Routed | None) -> dict[str, Any]:
        """What a router's results depend on in addition to the experts' weights."""
        facts: dict[str, Any] = {"router": _written(routed.router) if routed else None}
        if routed and routed.policy is not None:
            facts["evidence"] = str(routed.policy.evidence)  # with settings that the router's config does not have
        if routed and GATED in routed.router.needs:
            files = {name: self.library[name].weights.parent / GATES_FILE for name in routed.experts}
            facts["gates"] = {name: known_sha256(file)[:16] for name, file in files.items()}
        if routed and NORMED in routed.router.needs and self.library.calibration is not None:
            facts["norms"] = json_sha256(self.library.calibration.norms)[:16]
        if routed and DESCRIBED in routed.router.needs:
            facts["descriptions"] = dict(self.library.descriptions)
            facts["guide"] = str(routed.guide)
        return facts

    def check(self) -> None:
        """Raise :class:`DataError` if examples cannot be scored with this model, for all tasks at once."""
        problems: list[SpectrError] = []
        for name, (task, _) in self.owned.items():
            with collecting(problems):
                self._lost(name)
                if task.choices is None:
                    text_metric(task.metric)
        raise_together("the tasks cannot be scored with this model", problems, DataError)

    def remarks(self) -> list[str]:
        """Notes on the tasks for readers of the accuracies: metric, form, shortened prompts."""
        counts = [f"{name} {len(examples)}" for name, (_, examples) in self.owned.items()]
        found = [f"Examples: {', '.join(counts)}."]
        for name, (task, _) in self.owned.items():
            if task.metric != "accuracy":
                found.append(f"{name} is free text, measured by {task.metric}.")
            lost = sum(map(bool, self._lost(name)))
            if lost:
                found.append(
                    f"{lost} {'prompt' if lost == 1 else 'prompts'} of {name} left no room for the answer in the "
                    f"model's context of {context_length(self.model)} tokens and lost their beginning.",
                )
        lettered = [name for name, (task, _) in self.owned.items() if task.form == "letters"]
        found += [f"Options have letters, and the answer is a letter: {', '.join(lettered)}."] if lettered else []
        return found

    def _lost(self, task: str) -> list[int]:
        """Tokens that each prompt of a task loses."""
        about, examples = self.tasks[task]
        room = about.max_new_tokens if about.choices is None else 0
        context = context_length(self.model)
        encoded = encode_examples(self.tokenizer, examples, context, max_new_tokens=room, name=task)
        return [one.lost for one in encoded]

    def origin(self) -> dict[str, Any]:
        """Model, experts, tasks and versions that results depend on."""
        calibration = self.library.calibration
        return {
            "model": Path(str(self.model.config.name_or_path)).name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "experts": {name: known_sha256(self.library[name].weights)[:16] for name in self.library},
            "calibration": dict(calibration.settings) | {"opening": None, "turn": None} if calibration else None,
            "tasks": {
                name: f"v{task.version}{_form(task)}, {len(examples)} examples"
                for name, (task, examples) in self.tasks.items()
            },
            "versions": package_versions("spectr-lora", "torch", "transformers"),
        }


def _written(router: Router) -> dict[str, Any] | str:
    """A router as stored results name it: its config, which a new setting with a default does not change."""
    try:
        config = router_config(router)
        return {key: value for key, value in config.items() if (key, value) != ("abstain", None)}  # as all did once
    except CompositionError:  # no name gives it
        return str(router)


def _form(task: Task) -> str:
    """What sets a task apart from choices in words: ", lettered", ", rougeL", or nothing."""
    return (", lettered" if task.form == "letters" else "") + (f", {task.metric}" if task.metric != "accuracy" else "")


def _label(name: str, options: Mapping[str, Any]) -> str:
    return ", ".join([name, *(f"{key.replace('top_k', 'k')} {_in_words(value)}" for key, value in options.items())])


def _in_words(value: Any) -> str:
    """A setting for a label: of a router its name, and its settings in brackets."""
    if not isinstance(value, Mapping):
        return str(value)
    inner = [f"{key} {_in_words(one)}" for key, one in value.items() if key != "name"]
    return str(value["name"]) + (f" ({', '.join(inner)})" if inner else "")


def seeds_note(label: str, runs: Sequence[Mapping[str, Sequence[Finding]]], setup: ExperimentSetup) -> list[str]:
    """The note on a router that was measured once for each seed."""
    if len(runs) < 2:
        return []
    each = [over_runs([run], lambda finding: finding.place == 1).value for run in runs]
    seeds = ", ".join(f"{seed}: {value:.1%}" for seed, value in zip(setup.seeds, each, strict=True))
    return [f"{label} is the mean over calibration seeds, prompts found at once by seed {seeds}."]


def percent(measurement: Measurement) -> str:
    """A share in percent with its standard error; if all values are equal, with their number."""
    if math.isnan(measurement.value):
        return "-"
    if measurement.error == 0 and measurement.value in (0.0, 1.0):
        return f"{measurement.value:.0%} of {measurement.count}"
    return f"{measurement.value:.1%} ± {measurement.error:.1%}"
