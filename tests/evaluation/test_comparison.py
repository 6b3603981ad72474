"""Comparing routers: shares with paired errors, means over seeds, the table of all, and what the command is asked."""

from __future__ import annotations

import json
import random

import pytest

from adapters_on_disk import write_adapter
from models import close, dense_deltas
from spectr.errors import SpectrError
from spectr.evaluation.evaluation_plan import ORDER, read_plan
from spectr.evaluation.experiment_runs import summary, tradeoff
from spectr.evaluation.experiments import Result, robustness
from spectr.evaluation.expert_recall import Finding, over_runs
from spectr.evaluation.paired_statistics import in_words, mean_share
from spectr.library import ExpertLibrary
from text_model import save_experts, save_rows


def test_a_method_that_answers_like_the_expert_has_no_error():
    own = {"a": [1.0, 0.0, 1.0, 1.0], "b": [0.0, 1.0]}
    found = mean_share(own, own)
    assert (found.value, found.error, found.count) == (1.0, 0.0, 6)
    assert in_words(found) == "100%, the same on all 6"
    assert in_words(mean_share({**own, "b": [0.0, 0.0]}, own)) == "50.0% ± 0.0%"


def test_the_share_is_a_mean_of_ratios():
    own = {"a": [1.0, 0.0, 1.0, 1.0], "b": [0.0, 1.0]}
    found = mean_share({"a": [1.0, 0.0, 0.0, 0.0], "b": [1.0, 1.0]}, own)
    assert found.value == pytest.approx((1 / 3 + 2) / 2)


def test_the_error_is_what_resampling_the_examples_gives():
    """Against a bootstrap of pairs."""
    chance = random.Random(0)
    own = [float(chance.random() < 0.8) for _ in range(400)]
    method = [o if chance.random() < 0.8 else float(chance.random() < 0.5) for o in own]
    found = mean_share({"a": method}, {"a": own})
    drawn = []
    for _ in range(2000):
        rows = chance.choices(range(400), k=400)
        drawn.append(sum(method[i] for i in rows) / sum(own[i] for i in rows))
    mean = sum(drawn) / len(drawn)
    spread = (sum((value - mean) ** 2 for value in drawn) / len(drawn)) ** 0.5
    assert found.error == pytest.approx(spread, rel=0.1)


def test_tasks_that_the_expert_never_gets_right_are_left_out():
    own = {"a": [1.0, 1.0], "b": [0.0, 0.0]}
    assert mean_share({"a": [1.0, 0.0], "b": [1.0, 1.0]}, own).value == 0.5
    assert mean_share(own, {"b": [0.0]}).count == 0


def finding(place):
    return Finding(top_1=0.0, top_4=0.0, place=place, winner="x")


def test_a_prompts_value_is_its_mean_over_the_runs():
    runs = [
        {"a": [finding(1), finding(2)], "b": [finding(1)]},
        {"a": [finding(1), finding(1)], "b": [finding(2)]},
    ]
    found = over_runs(runs, lambda f: f.place == 1)
    assert (found.value, found.count) == (pytest.approx((1 + 0.5 + 0.5) / 3), 3)
    assert over_runs(runs, lambda f: f.place == 1, ["b"]).value == 0.5


# The table of all


def result(name, **data):
    return Result(name=name, title=name, source="", columns=[], rows=[], data=data, origin={"command": f"run {name}"})


def test_the_summary_puts_experiments_together():
    routing = result("routing", summary={"r": {"first": [0.5, 0.1]}, "only here": {"first": [0.1, 0.1]}})
    wording = result("wording", summary={"r": {"first": [0.4, 0.1], "two": [0.6, 0.1], "share": [0.9, 0.01]}})
    multitask = result("multitask", methods={"r": {"share": 0.95, "error": 0.02}})
    robustness = result("robustness", cases={"x": {"r": {"stolen": 0.25}}, "y": {"r": {"stolen": 0.5}}})
    found = summary([routing, wording, multitask, robustness])
    assert found is not None
    assert found.rows == [
        ["r", "50.0% ± 10.0%", "40.0% ± 10.0%", "60.0% ± 10.0%", "95.0% ± 2.0%", "90.0% ± 1.0%", "50.0%"]
    ]
    assert found.origin["commands"] == ["run routing", "run wording", "run multitask", "run robustness"]
    assert len(found.columns) == len(found.rows[0])


def test_without_routing_there_is_no_summary():
    assert summary([result("costs")]) is None


def test_quality_against_cost_puts_experiments_together():
    row = {"flops": 5.0, "formula": 5, "probe": 0}
    costs = result("costs", base=100.0, routers={"r": row, "cheap": {**row, "flops": 1.0}, "only here": row})
    held = {
        "r": {"share": 0.9, "error": 0.01},
        "cheap": {"share": 1.0, "error": 0.0},
        "base": {"share": 0.5, "error": 0.1},
    }
    gains = {"r": {"gain": 0.02, "error": 0.01}}
    found = tradeoff([costs, result("multitask", methods=held), result("heldout", methods=gains)])
    assert found is not None
    assert found.rows == [["r", "5.0%", "90.0% ± 1.0%", "+2.0 ± 1.0"], ["cheap", "1.0%", "100%", ""]]
    assert found.data["points"]["r"] == {"cost": 0.05, "held_in": [0.9, 0.01], "held_out": [0.02, 0.01]}
    assert found.data["base"] == 0.5
    assert tradeoff([costs]) is None


# What the command is asked


@pytest.fixture
def world(tmp_path):
    library = ExpertLibrary.open(save_experts(tmp_path / "adapters", ("amber", "blue")))
    rows = save_rows(tmp_path / "rows.jsonl", 4)
    for name in library:
        (tmp_path / f"{name}.yaml").write_text(
            f"name: {name}\nversion: 1\nprompt: what is the colour of the {{thing}}\nchoices: [green, blue]\n"
            f"test: {rows}\n"
        )
    return tmp_path, library


def ask(world, experiment, tasks=("amber", "blue"), **more):
    root, library = world
    given = {"data_root": None, "letters": False, "limit": None, "ranks": None, "substitutes": ()}
    return read_plan(experiment, library, tasks=[str(root / f"{task}.yaml") for task in tasks], **{**given, **more})


def test_all_leaves_out_what_lacks_its_needs_and_reports_it(world):
    asked = ask(world, "all", tasks=["amber"])
    assert set(ORDER) - set(asked.experiments) == {"wording", "mixed", "ranks", "heldout"}
    told = {remark.split(":")[0] for remark in asked.remarks}
    assert told == {f"{name} is left out" for name in ("wording", "mixed", "ranks", "heldout")}


@pytest.mark.parametrize(
    ("experiment", "tasks", "message"),
    [
        ("wording", ("amber", "blue"), "none of these tasks has paraphrases"),
        ("mixed", ("amber",), "it needs two tasks"),
        ("ranks", ("amber", "blue"), "there are no experts of other ranks"),
        ("rank", ("amber", "blue"), "did you mean 'ranks'?"),
    ],
)
def test_an_experiment_that_lacks_its_needs_is_refused(world, experiment, tasks, message):
    with pytest.raises(SpectrError) as caught:
        ask(world, experiment, tasks)
    assert message in " ".join(str(caught.value).split())


def test_experts_of_other_ranks_are_read_by_name(world):
    root, _ = world
    save_experts(root / "ranks", ("amber-r4", "blue-r4", "amber-r8", "blue-r8"))
    assert {rank: library.names for rank, library in ask(world, "ranks", ranks=root / "ranks").ranks.items()} == {
        4: ("amber", "blue"),
        8: ("amber", "blue"),
    }
    save_experts(root / "gaps", ("amber-r4", "blue-r4", "blue-r8"))
    for folder, message in (("gaps", "lacks amber-r8"), ("adapters", "no adapters named EXPERT-rRANK")):
        with pytest.raises(SpectrError, match=message):
            ask(world, "ranks", ranks=root / folder)


def test_an_expert_is_changed_that_relies_on_peft_s_default_scale(tmp_path):
    folder = write_adapter(tmp_path / "amber")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))  # PEFT's default
    plain = dense_deltas(folder)
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    library = ExpertLibrary.from_adapters({"amber": folder})
    made = robustness.changed_expert(library, "amber", tmp_path / "changed", robustness._larger)
    for module, delta in dense_deltas(made).items():
        close(delta, 100 * plain[module], 1e-4)


def test_substitutes_are_checked_together(world):
    root, _ = world
    good = root / "adapters" / "blue"
    asked = ask(world, "robustness", substitutes=[f"amber={good}"])
    assert asked.substitutes == [("blue in place of amber", "amber", good)]
    with pytest.raises(SpectrError) as caught:
        ask(world, "robustness", substitutes=["amber", f"green={good}", f"amber={root / 'none'}"])
    text = " ".join(str(caught.value).split())
    for message in ("EXPERT=FOLDER", "'green'", "none"):
        assert message in text
