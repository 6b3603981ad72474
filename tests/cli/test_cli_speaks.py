"""What the command line says unasked: a router that stands in for another, options that do nothing, what is unlike."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from adapters_on_disk import write_adapter
from spectr import ExpertLibrary
from spectr.library import LibraryStore
from text_model import save_experts, save_rows


def test_a_router_that_stands_in_says_why_and_what_to_do(spectr, given, world):
    _, _, notes = spectr("generate", "what is it", "-n", 1, *given)
    said = " ".join(notes.split())
    assert "router: spectr, for each token, since amber, blue, cyan are not calibrated" in said
    assert f"spectr library calibrate --library {world / 'adapters'}" in said
    assert "all of 3 are used for every token: the router chooses up to 3" in said


def test_nothing_is_said_of_a_router_that_was_asked_for(spectr, given):
    _, _, notes = spectr("generate", "what is it", "-n", 1, "-r", "spectr", "-k", 1, *given)
    assert "router:" not in notes
    assert "are used for every token" not in notes


def test_a_router_without_its_calibration_is_refused_before_the_model_is_loaded(spectr, given):
    code, _, notes = spectr("generate", "what is it", "-r", "calibrated", *given)
    assert code == 2
    assert "not calibrated: amber, blue, cyan" in notes
    assert "loading" not in notes


def test_an_allow_list_with_commas(spectr, given):
    _, text, notes = spectr("generate", "what", "--json", "-n", 1, "-a", "blue,cyan", "-a", "amber", *given)
    assert set(json.loads(text)["experts"]) == {"amber", "blue", "cyan"}
    assert "all of 3" in notes


def test_an_empty_allow_list(spectr, given):
    code, _, notes = spectr("generate", "what", "-a", " , ", *given)
    assert code == 2
    assert "the allow-list is empty" in notes


def test_an_expert_without_the_oracle(spectr, given):
    code, _, notes = spectr("generate", "what", "-e", "blue", *given)
    assert code == 2
    assert "-r oracle -e NAME, or --allow NAME" in " ".join(notes.split())


def test_one_decision_for_a_whole_prompt_is_said(spectr, given, world, tmp_path):
    library = save_experts(tmp_path / "adapters", ("amber", "blue"))
    shown = ("--model", world / "model", "--library", library, "--dtype", "float32")
    assert spectr("library", "calibrate", "--samples", 2, "--tokens", 4, *shown)[0] == 0
    _, _, notes = spectr("route", "what is it", "--set", "abstain=none", *shown)
    assert "decides once for the whole prompt; to see a choice for every token: spectr route -r spectr" in " ".join(
        notes.split()
    )
    _, _, notes = spectr("route", "what is it", "-r", "spectr", *shown)
    assert "decides once" not in notes


# Libraries


def test_weights_that_changed_after_they_were_added_are_reported_wherever_they_count(spectr, world, tmp_path):
    library = tmp_path / "library"
    shown = ("-l", library, "--model", world / "model", "--dtype", "float32")
    for name in ("amber", "blue"):
        spectr("library", "add", name, world / "adapters" / name, "-l", library)
    assert spectr("library", "calibrate", "--samples", 2, "--tokens", 4, *shown)[0] == 0
    assert spectr("library", "index", *shown)[0] == 0
    said = " ".join(spectr("library", "add", "cyan", world / "adapters" / "cyan", "-l", library)[2].split())
    assert f"calibrate --library {library}, then spectr library index --library {library}" in said
    spectr("library", "remove", "cyan", "-l", library)
    [amber], [blue] = (list(library.glob(f"{name}-*/adapter_model.safetensors")) for name in ("amber", "blue"))
    shutil.copy(blue, amber)
    alone = ("-r", "shortlist", "--set", "size=1", "--allow", "amber")
    for command in (
        ("library", "calibrate", "--fresh"),
        ("library", "index", "--fresh"),
        ("generate", "what is it"),
        ("generate", "what is it", *alone),
    ):
        code, _, notes = spectr(*command, *shown)
        assert code == 2
        assert f"{amber} changed since it was added" in notes
        assert "spectr library verify" in notes
    assert spectr("generate", "what is it", *alone[:-1], "blue", *shown)[0] == 0


def test_a_damaged_calibration_is_made_anew(spectr, world, tmp_path):
    shutil.copytree(world / "adapters", tmp_path / "adapters")
    shown = ("-l", tmp_path / "adapters", "--model", world / "model", "--samples", 2, "--tokens", 4)
    assert spectr("library", "calibrate", *shown)[0] == 0
    path = tmp_path / "adapters" / "calibration.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    code, _, notes = spectr("library", "calibrate", *shown)
    assert code == 2
    assert "--fresh" in notes
    assert spectr("library", "calibrate", "--fresh", *shown)[0] == 0
    assert spectr("library", "calibrate", *shown)[1].startswith("all 3 experts are calibrated")


def test_list_says_who_is_calibrated_and_add_says_what_is_next(spectr, world, tmp_path):
    library = tmp_path / "library"
    code, _, notes = spectr("library", "add", "amber", world / "adapters" / "amber", "-l", library)
    assert code == 0
    assert f"spectr library calibrate --library {library}" in " ".join(notes.split())
    shown = ("--model", world / "model", "--dtype", "float32")
    assert spectr("library", "calibrate", "-l", library, "--samples", 2, "--tokens", 4, *shown)[0] == 0
    code, text, notes = spectr("library", "calibrate", "-l", library, *shown)
    assert (code, text) == (0, "all 1 experts are calibrated; to measure them again, use --fresh\n")
    assert "loading" not in notes
    spectr("library", "add", "blue", world / "adapters" / "blue", "-l", library)
    rows = {line.split("│")[1].strip(): line.split("│")[5].strip() for line in _table(spectr, library)}
    assert rows == {"amber": "yes", "blue": "no"}


def _table(spectr, library):
    return [line for line in spectr("library", "list", "-l", library)[1].splitlines() if line.startswith("│")]


def test_verify_reads_the_calibration_too(spectr, world, tmp_path):
    store = LibraryStore(tmp_path / "library")
    store.add("amber", world / "adapters" / "amber")
    (store.root / "calibration.safetensors").write_bytes(b"cut off")
    code, _, notes = spectr("library", "verify", "-l", store.root)
    assert code == 2
    assert f"spectr library calibrate --library {store.root}" in " ".join(notes.split())


def test_an_adapter_for_another_base_does_not_go_with_the_others(spectr, world, tmp_path):
    library = tmp_path / "library"
    spectr("library", "add", "amber", world / "adapters" / "amber", "-l", library)
    wide = save_experts(tmp_path / "wide", ("blue",)) / "blue"
    tensors = load_file(wide / "adapter_model.safetensors")
    save_file(
        {k: t.repeat(1, 2) if "lora_A" in k else t for k, t in tensors.items()}, wide / "adapter_model.safetensors"
    )
    code, _, notes = spectr("library", "add", "blue", wide, "-l", library)
    said = " ".join(notes.split())
    assert code == 2
    assert "'blue' does not match 'amber'" in said
    assert "add it to another library" in said
    assert ExpertLibrary.open(library).names == ("amber",)


def test_weights_without_a_configuration_are_not_passed_over(spectr, given, tmp_path):
    adapters = save_experts(tmp_path / "adapters", ("amber", "blue"))
    (adapters / "blue" / "adapter_config.json").unlink()
    code, _, notes = spectr("generate", "what", "-l", adapters)
    assert code == 2
    assert "blue" in notes
    assert "adapter_config.json" in notes


# Evaluation and training


@pytest.fixture
def task(tmp_path):
    rows = save_rows(tmp_path / "rows.jsonl", 6)
    path = tmp_path / "blue.yaml"
    path.write_text(
        f"name: blue\nversion: 1\nprompt: what is the {{thing}}\nchoices: [green, blue]\ntrain: {rows}\ntest: {rows}\n"
    )
    return path


def test_the_command_of_a_result_names_what_it_was_asked(spectr, given, task, tmp_path):
    out = tmp_path / "out"
    code, _, notes = spectr("evaluate", "quality", "--task", task, "--limit", 4, "-o", out, *given)
    assert code == 0, notes
    command = json.loads((out / "quality.json").read_text())["origin"]["command"]
    assert (
        command == "spectr evaluate quality --model model --library adapters --task blue.yaml --limit 4 --dtype float32"
    )


def test_the_result_of_another_run_is_not_replaced_in_silence(spectr, given, task, tmp_path):
    out = tmp_path / "out"
    asked = ("evaluate", "quality", "--task", task, "-o", out, *given)
    assert "is kept" not in spectr(*asked)[2]
    assert "is kept" not in spectr(*asked)[2]
    before = (out / "quality.json").read_text()
    assert "an earlier result of quality was renamed to" in spectr(*asked, "--limit", 2)[2]
    assert (out / "quality.before.json").read_text() == before


def test_where_all_are_alike_their_number_is_given(spectr):
    from spectr.evaluation.experiments.setup import percent
    from spectr.evaluation.score import Measurement

    assert percent(Measurement.of([1.0] * 12)) == "100% of 12"
    assert percent(Measurement.of([0.0] * 3)) == "0% of 3"
    assert percent(Measurement.of([1.0, 0.0])) == "50.0% ± 50.0%"


def test_training_says_when_it_is_measured_on_its_own_rows_and_refuses_a_wrong_target_at_once(
    spectr, world, task, tmp_path
):
    shown = ("--task", task, "--model", world / "model", "--target-modules", "nosuch", "-o", tmp_path / "run")
    code, _, notes = spectr("train", *shown)
    assert code == 2
    assert "the accuracy does not hold for new rows" in " ".join(notes.split())
    assert "nosuch" in notes
    assert "base model on the test data" not in notes


def test_adding_an_expert_reports_copies_and_another_base_model(spectr, tmp_path):
    library, one = tmp_path / "library", write_adapter(tmp_path / "one", base_model_name_or_path="org/base")
    other = write_adapter(tmp_path / "two", seed=1, base_model_name_or_path="org/other")
    assert "the same files" not in spectr("library", "add", "law", one, "-l", library)[2]
    assert "'law' has the same files" in spectr("library", "add", "tax", one, "-l", library)[2]
    notes = spectr("library", "add", "sql", other, "-l", library)[2]
    assert "the base model 'org/other'" in notes
    assert "'org/base'" in notes
    rows = json.loads(spectr("library", "list", "-l", library, "--json")[1])
    assert [row["calibrated"] for row in rows] == [False] * 3
    notes = spectr("library", "list", "-l", library)[2]
    assert "law, tax for org/base: " in notes
    assert "sql for org/other: " in notes
    for name in ("law", "tax", "sql"):
        spectr("library", "remove", name, "-l", library)
    assert "is an empty library" in spectr("library", "list", "-l", library)[1]
    code, _, notes = spectr("generate", "hi", "-l", library)
    assert code == 2
    assert "is an empty library" in notes
    assert f"spectr library add NAME ADAPTER --library {library}" in notes


def test_a_card_of_blanks_is_not_shown(spectr, tmp_path):
    library, adapter = tmp_path / "library", write_adapter(tmp_path / "one")
    (adapter / "README.md").write_text("# Model Card for Model ID\n\nDeveloped by: [More Information Needed]\n")
    spectr("library", "add", "law", adapter, "-l", library)
    code, text, notes = spectr("library", "show", "law", "-l", library)
    assert code == 0
    assert "More Information" not in text
    assert "its card is PEFT's template" in notes


def test_a_path_in_a_note_is_printed_unchanged(spectr, tmp_path):
    library = tmp_path / "my [exp] library, with a name that is longer than any line of a terminal has columns left"
    notes = spectr("library", "add", "law", write_adapter(tmp_path / "one"), "-l", library)[2]
    assert f"spectr library calibrate --library '{library}'" in notes


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ("oracle", "'quality' measures each task's own expert"),
        ("shortlist", "spectr library calibrate --library"),
    ],
)
def test_a_router_that_cannot_be_compared_leaves_no_result(spectr, given, task, tmp_path, router, message):
    code, _, notes = spectr("evaluate", "routing", "--task", task, "-r", router, "-o", tmp_path / "out", *given)
    assert code == 2
    assert message in notes
    assert not (tmp_path / "out" / "routing.json").exists()
