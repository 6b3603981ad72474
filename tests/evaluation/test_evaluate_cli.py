"""Free text, lettered options and data on the Hub from the command line."""

from __future__ import annotations

import json
import sys

import pytest

from spectr.tasks import Task
from text_model import save_experts, save_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    save_model(root / "model")
    save_experts(root / "experts", ("amber", "blue"))
    rows = [
        {"thing": "sky" if i % 2 else "grass", "colour": "blue" if i % 2 else "green", "label": i % 2} for i in range(8)
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = "version: 1\nexpert: blue\nprompt: what is the colour of the {thing}\n"
    data = f"test: {root}/rows.jsonl\ntrain: {root}/rows.jsonl\n"
    files = {
        "free": f'name: free\n{base}answer: "{{colour}}"\nmetric: rougeL\nmax_new_tokens: 3\n{data}',
        "words": f"name: words\n{base}choices: [green, blue]\n{data}",
        "both": f'name: both\n{base}choices: [green, blue]\nletters: "what {{thing}} {{options}}"\n{data}',
        "none": f"name: none\nversion: 1\nprompt: what\nchoices: [green, blue]\nexpert: bleu\n{data}",
        "lost": f"name: lost\nversion: 1\nprompt: what\nchoices: [green, blue]\n{data}",
    }
    for name, text in files.items():
        (root / f"{name}.yaml").write_text(text)
    return root


def evaluate(spectr, world, *words):
    given = ("--model", world / "model", "--library", world / "experts", "--dtype", "float32")
    return spectr("evaluate", *(world / w if str(w).endswith(".yaml") else w for w in words), *given)


def test_free_text_from_the_command_line(spectr, world, tmp_path):
    for experiment in ("quality", "multitask", "routing"):
        code, text, _ = evaluate(spectr, world, experiment, "--task", "free.yaml", "--out", tmp_path)
        assert code == 0, text
        assert "free" in (tmp_path / f"{experiment}.json").read_text()
    assert "free is free text, measured by rougeL." in json.loads((tmp_path / "quality.json").read_text())["notes"]


def test_settings_of_routers_from_the_command_line(spectr, world, tmp_path):
    words = ("routing", "--task", "words.yaml", "--out", tmp_path)
    code, text, _ = evaluate(spectr, world, *words, "-r", "arrow", "-r", "mu", "--set", "top_k=1")
    assert code == 0, text
    result = json.loads((tmp_path / "routing.json").read_text())
    assert [row[0] for row in result["rows"] if "arrow" in row[0]] == ["arrow, k 1"]
    assert "--set top_k=1" in result["origin"]["command"]
    code, text, _ = evaluate(spectr, world, *words, "-r", "lag", "--set", "shortlist=2", "--set", "top_k=1")
    assert [row[0] for row in json.loads((tmp_path / "routing.json").read_text())["rows"]] == ["lag, shortlist 2, k 1"]


def test_letters_from_the_command_line(spectr, world, tmp_path):
    for letters in ((), ("--letters",)):
        code, *_ = evaluate(spectr, world, "quality", "--task", "both.yaml", "--out", tmp_path, *letters)
        assert code == 0
    made = json.loads((tmp_path / "quality.json").read_text())
    assert made["origin"]["tasks"] == {"both": "v1, lettered, 8 examples"}
    assert "--letters" in made["origin"]["command"]
    assert "Options have letters, and the answer is a letter: both." in made["notes"]
    records = {path.name for path in (tmp_path / "records").iterdir()}
    assert {"both--base.jsonl", "both, lettered--base.jsonl"} <= records
    code, text, notes = evaluate(spectr, world, "all", "--task", "both.yaml", "--out", tmp_path, "--letters")
    assert code == 0, text
    assert "wording is left out" in notes
    assert "lettered options have no paraphrases" in notes


def test_training_with_letters_is_noted_on_the_card(spectr, world, tmp_path):
    pytest.importorskip("peft")
    words = ("train", "--task", world / "both.yaml", "--letters", "-o", tmp_path / "e", "--model", world / "model")
    assert spectr(*words)[0] == 0
    assert json.loads((tmp_path / "e" / "expert.json").read_text())["data"]["task"] == "both v1, lettered"


def test_data_from_the_hub_by_one_setting(spectr, world, tmp_path, monkeypatch):
    class Hub:
        def __init__(self):
            self.asked = []

        def load_dataset(self, *names, split):
            self.asked.append((*names, split))
            return [{"sentence": "the film is good", "label": i % 2} for i in range(4)]

    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    words = ("train", "--task", "sst2", "--data-root", "hub", "-o", tmp_path / "e", "--model", world / "model")
    code, text, _ = spectr(*words)
    assert code == 0
    assert "on 4 test rows" in text
    assert hub.asked == [("nyu-mll/glue", "sst2", "train"), ("nyu-mll/glue", "sst2", "validation")]
    card = json.loads((tmp_path / "e" / "expert.json").read_text())
    assert card["data"]["train"] == "hub:nyu-mll/glue:sst2:train"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quality", "--task", "words.yaml", "--letters"), "task 'words' has no form with lettered options"),
        (
            ("wording", "--task", "both.yaml", "--letters"),
            "lettered options have no paraphrases to do: remove --letters",
        ),
        (("routing", "-r", "arrow", "--set", "topk=1"), "router 'arrow' has no topk"),
        (("routing", "-r", "arrow", "--set", "combine=sum"), "router 'arrow': unknown combination 'sum'"),
        (("routing", "--set", "top_k=1"), "--set top_k=1 without a router to do: name its routers"),
        (("similarity", "-r", "arrow"), "similarity compares no routers to do: remove --router and --set"),
        (("quality", "--set", "top_k=1"), "quality compares no routers to do: remove --router and --set"),
        (("routing", "-r", "arrow", "-r", "mu", "-r", "arrow"), "--router arrow twice"),
        (("routing", "-r", "arrow,mu"), "--router arrow --router mu"),
        (("routing", "-r", "arow", "-r", "sepctr"), "these routers cannot be compared: 2 problems"),
        (("routing", "-r", "arrow", "-r", "mu", "--set", "toq_k=1"), "none of these routers has toq_k"),
        (("routing", "-r", "arrow", "--set", "top_k=0"), "router 'arrow': top_k=0 expected: a whole number"),
        (("routing", "-r", "arrow", "--set", "spectr.top_k=1"), "the router spectr is not used here"),
        (("all", "-r", "calibrated"), "not calibrated: amber, blue"),
        (("quality", "--substitute", "amber=x"), "--substitute is for the experiment robustness to do: remove it"),
        (("robustness", "--companion", "amber"), "use --substitute"),
        (("robustness", "--companion", "amber"), "--substitute amber expected: EXPERT=FOLDER"),
        (("routing", "--writer", "http://host/v1"), "the model's name after the address: http://host/v1#MODEL"),
        (("quality", "--task", "words.yaml", "--task", "words.yaml"), "two tasks have the name 'words'"),
        (("routng",), "unknown experiment 'routng' to do: did you mean 'routing'?"),
        (("wording", "--task", "words.yaml"), "none of these tasks has paraphrases to do: add 'paraphrases'"),
        (("quality", "--task", "words.yaml", "--data-root", "hub"), "task 'words' has no test data on the Hub"),
        (("quality", "--task", "words.yaml", "--task", "none.yaml"), "task 'none' belongs to the expert 'bleu', which"),
        (("quality", "--task", "none.yaml"), "expected: one of amber, blue to do: add it with spectr library add bleu"),
        (("quality", "--task", "none.yaml", "--task", "lost.yaml"), "tasks without an expert: 2 problems"),
    ],
)
def test_mistakes_get_one_message_before_a_model_is_loaded(spectr, world, tmp_path, words, message, monkeypatch):
    monkeypatch.setattr("spectr.cli.evaluate.open_model", None)
    code, text, notes = evaluate(spectr, world, *words, "--out", tmp_path / "out")
    assert (code, text) == (2, "")
    assert message in " ".join(notes.split())
    assert not (tmp_path / "out").exists()


def test_a_choice_without_tokens_is_named_before_anything_is_scored(spectr, world, tmp_path):
    rows = [{"thing": "sky", "ends": ["green", "blue"], "label": 1}, {"thing": "sky", "ends": [" ", "no"], "label": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tmp_path / "second.yaml"
    task.write_text(
        f"name: second\nversion: 1\nexpert: blue\nprompt: what\nchoices: ends\ntest: {tmp_path}/rows.jsonl\n"
    )
    code, _, notes = evaluate(
        spectr, world, "quality", "--task", "words.yaml", "--task", task, "--out", tmp_path / "out"
    )
    assert code == 2
    assert "task 'second', example 2: the choice ' ' has no tokens" in notes
    assert not (tmp_path / "out").exists()


def test_without_task_those_whose_expert_is_absent_are_left_out(spectr, world, tmp_path, monkeypatch):
    import spectr.tasks as package

    tasks = {name: Task.load(world / f"{name}.yaml") for name in ("words", "lost")}
    monkeypatch.setattr(package, "shipped_tasks", lambda: tasks)
    code, text, notes = evaluate(spectr, world, "quality", "--out", tmp_path)
    assert code == 0
    assert "left out, since the library has no expert for them: lost" in notes
    assert "words" in text


def test_the_command_keeps_ids_and_addresses_and_quotes(tmp_path):
    from spectr.evaluation.experiment_runs import _command

    folder = tmp_path / "my experts"
    folder.mkdir()
    given = {
        "model": "org/model",
        "library": folder,
        "companion": [f"fine={folder}"],
        "writer": "http://host/v1#org/model",
        "json": True,
    }
    assert _command("robustness", given) == (
        "spectr evaluate robustness --model org/model --library 'my experts' --companion 'fine=my experts' "
        "--writer 'http://host/v1#org/model' --json"
    )
