"""Held-out tasks as an experiment, and the whole family of routers in the comparisons."""

from __future__ import annotations

import pytest

from guided import DESCRIPTIONS, NAMES, embed, library_with_gates
from questions import CHOICES, EXAMPLES
from spectr import ExpertLibrary, calibrate
from spectr.errors import DataError
from spectr.evaluation.evaluation_plan import read_plan
from spectr.evaluation.experiments import EXPERIMENTS, ExperimentSetup
from spectr.evaluation.paired_statistics import mean_difference
from spectr.guidance import QueryGuide
from spectr.tasks import Task, heldout_tasks, shipped_tasks
from text_model import make_model, make_tokenizer, save_experts, save_rows


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = library_with_gates(tmp_path_factory.mktemp("family"), NAMES).with_descriptions(DESCRIPTIONS)
    return found.with_calibration(calibrate(make_model(), found, make_tokenizer(), samples=3, null=0))


def bench_of(library, folder, **more):
    def task(name):
        return Task.of(name=name, version=1, prompt="{x}", choices=CHOICES), EXAMPLES

    tokenizer = make_tokenizer()
    return ExperimentSetup(
        model=make_model(),
        tokenizer=tokenizer,
        library=library,
        tasks={name: task(name) for name in ("grass", "sky")},
        held_out={name: task(name) for name in ("first", "second")},
        folder=folder,
        guide=lambda: QueryGuide(tokenizer, embed),
        **more,
    )


def test_hindsight_is_the_best_of_the_experts(library, tmp_path):
    found = EXPERIMENTS.load("heldout")(bench_of(library, tmp_path)).data
    alone, methods = found["experts_alone"], found["methods"]
    for task in found["tasks"]:
        best = methods["best expert of each task in hindsight"]["accuracy"][task]
        assert best == max(alone[name][task] for name in NAMES)
        assert best == alone[found["best"][task]][task]
    [single] = [label for label in methods if label.startswith("best single expert")]
    assert methods[single]["mean"] == pytest.approx(max(sum(alone[name].values()) / 2 for name in NAMES))
    assert methods["base"]["gain"] == 0
    for label, method in methods.items():
        gains = [method["accuracy"][task] - methods["base"]["accuracy"][task] for task in found["tasks"]]
        assert method["gain"] == pytest.approx(sum(gains) / 2), label
    assert {"phatgoose", "glider", "lag, shortlist 3, k 1", "calibrated", "mu"} <= set(methods)


def test_differences_are_paired():
    found = mean_difference({"a": [1.0, 1.0, 0.0, 1.0]}, {"a": [1.0, 0.0, 0.0, 1.0]})
    assert (found.value, found.count) == (0.25, 4)
    assert found.error == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert mean_difference({"a": [1.0, 0.0]}, {"a": [1.0, 0.0]}).error == 0


@pytest.mark.parametrize("name", ["routing", "multitask", "wording", "costs"])
def test_the_family_takes_part_and_the_rest_is_reported(library, tmp_path, name):
    reworded = {task: [EXAMPLES] for task in ("grass", "sky")}
    result = EXPERIMENTS.load(name)(bench_of(library, tmp_path, reworded=reworded))
    labels = [row[0] for row in result.rows]
    assert {"phatgoose", "glider"} <= set(labels)
    assert any("Left out for lack of experts: arrow" in note for note in result.notes)
    bare = ExpertLibrary.from_adapters({name: library[name].weights.parent for name in library})
    notes = EXPERIMENTS.load(name)(bench_of(bare, tmp_path / "bare", reworded=reworded)).notes
    assert any(note.startswith("Left out for lack of a calibration: calibrated") for note in notes)
    assert any(
        note.startswith("Left out for lack of descriptions, or of a model that embeds them: glider") for note in notes
    )


def test_records_depend_on_gates_and_descriptions(library, tmp_path):
    bench = bench_of(library, tmp_path, only=("phatgoose", "glider", "mu"))
    EXPERIMENTS.load("multitask")(bench)
    keys = {path.name: path.read_text().splitlines()[0] for path in (tmp_path / "records").glob("sky--*.jsonl")}
    other = bench_of(library.with_descriptions({**DESCRIPTIONS, "sky": "film"}), tmp_path, only=bench.only)
    EXPERIMENTS.load("multitask")(other)
    again = {path.name: path.read_text().splitlines()[0] for path in (tmp_path / "records").glob("sky--*.jsonl")}
    changed = {name for name, key in keys.items() if again[name] != key}
    assert changed == {"sky--glider.jsonl"}
    assert "gates" in keys["sky--phatgoose.jsonl"]


def test_lag_with_a_full_shortlist_always_agrees(library, tmp_path):
    found = EXPERIMENTS.load("agreement")(bench_of(library, tmp_path)).data["routers"]
    shares = [found[f"lag, shortlist {size}"]["agreement"] for size in (1, 2)]
    assert 0 < shares[0] <= shares[1] <= 1
    assert found["seqr, experts that share A"]["agreement"] > 0.99
    assert found["seqr, experts that share A"]["flops"] < 1


def test_held_out_tasks_have_no_expert_here():
    assert not set(heldout_tasks()) & set(shipped_tasks())
    assert len(heldout_tasks()) >= 3
    assert heldout_tasks()["boolq"].choices == ("no", "yes")
    assert Task.shipped("boolq") == heldout_tasks()["boolq"]


def test_what_heldout_is_asked(tmp_path):
    library = ExpertLibrary.open(save_experts(tmp_path / "adapters", ("amber", "blue")))
    rows = save_rows(tmp_path / "rows.jsonl", 4)
    for name in ("amber", "other"):
        (tmp_path / f"{name}.yaml").write_text(
            f"name: {name}\nversion: 1\nprompt: the {{thing}}\nchoices: [green, blue]\ntest: {rows}\n"
        )
    given = {"data_root": str(tmp_path), "letters": False, "limit": 3, "ranks": None, "substitutes": ()}
    asked = read_plan("heldout", library, tasks=[str(tmp_path / "other.yaml")], **given)
    assert list(asked.held_out) == ["other"]
    assert len(asked.held_out["other"][1]) == 3
    with pytest.raises(DataError, match="has an expert for amber"):
        read_plan("heldout", library, tasks=[str(tmp_path / "amber.yaml")], **given)
    with pytest.raises(DataError, match=r"no data file at(.|\n)*no data file at"):  # all of them
        read_plan("heldout", library, tasks=(), **given)


def test_without_held_out_tasks_there_is_nothing_to_measure(library, tmp_path):
    bench = bench_of(library, tmp_path)
    with pytest.raises(DataError, match="no held-out tasks were given"):
        EXPERIMENTS.load("heldout")(ExperimentSetup(**{**vars(bench), "held_out": {}}))
