"""Tasks render rows as their templates say, and name what is wrong with a file or a row."""

import json
import sys

import pytest
import yaml

from adapters_on_disk import assert_says
from spectr.errors import DataError
from spectr.tasks import Example, Task, heldout_tasks, read_rows, shipped_tasks

SHIPPED = ("agnews", "cola", "dbpedia", "hellaswag", "mnli", "mrpc", "qnli", "qqp", "sst2")
CHOICE = {"name": "mood", "version": 1, "prompt": "Is it good?\n{text}", "choices": ["no", "yes"]}
FREE = {"name": "echo", "version": 1, "prompt": "Say {text}", "answer": "{text}, {times} times"}


def write(path, fields) -> str:
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return str(path)


class Hub:
    """Stands for the package 'datasets'; ``rows`` of ``None`` is a Hub that cannot be reached."""

    def __init__(self):
        self.asked, self.rows = [], [{"a": 1}, {"a": 2}, {"a": 3}]

    def load_dataset(self, *names, split):
        self.asked.append((*names, f"split={split}"))
        if self.rows is None:
            raise ConnectionError("no network here")
        return self.rows


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    return hub


class TestShipped:
    def test_all_nine_in_alphabetical_order(self):
        assert tuple(shipped_tasks()) == SHIPPED

    @pytest.mark.parametrize("name", SHIPPED)
    def test_the_sample_renders(self, name):
        task = Task.shipped(name)
        example = task.example(task.sample)
        assert task.name == task.expert == name
        assert 0 <= example.label < len(example.choices)
        assert example.label == task.sample["label"]
        assert example.answer == example.choices[example.label]
        assert len(set(example.choices)) == len(example.choices) >= 2
        fields = {key: value for key, value in task.sample.items() if isinstance(value, str)}
        assert all(value in example.prompt for value in fields.values())
        assert "{" not in example.prompt

    def test_a_rendered_prompt_in_full(self):
        row = {"title": "T", "description": "D with {braces}", "label": 3, "id": 7}
        assert Task.shipped("agnews").example(row) == Example(
            prompt="What is this news article about: World, Sports, Business or Sci/Tech?\n\nT\nD with {braces}",
            answer="Sci/Tech",
            choices=("World", "Sports", "Business", "Sci/Tech"),
            label=3,
        )

    def test_choices_of_the_rows_own(self):
        row = {"activity_label": "A", "ctx": "C", "endings": ["w", "x", "y", "z"], "label": 2}
        example = Task.shipped("hellaswag").example(row)
        assert (example.prompt.splitlines()[-1], example.answer) == ("A: C", "y")
        assert example.choices == ("w", "x", "y", "z")

    def test_an_unknown_name(self):
        with pytest.raises(DataError) as caught:
            Task.shipped("agnew")
        do = "did you mean 'agnews'? known: " + ", ".join(sorted([*SHIPPED, *heldout_tasks()]))
        assert_says(caught.value, given=("unknown task 'agnew'",), expected=None, do=do)


class TestLoad:
    def test_a_file_with_choices(self, tmp_path):
        task = Task.load(write(tmp_path / "t.yaml", {**CHOICE, "label": "y", "train": "a.jsonl", "note": "n"}))
        assert task.example({"text": "Fine.", "y": 1}) == Example(
            prompt="Is it good?\nFine.", answer="yes", choices=("no", "yes"), label=1
        )
        assert (task.train, task.test, task.note, task.length_normalised) == ("a.jsonl", None, "n", False)

    def test_a_file_with_a_free_answer(self, tmp_path):
        example = Task.load(write(tmp_path / "t.yaml", FREE)).example({"text": "é", "times": 3})
        assert example == Example(prompt="Say é", answer="é, 3 times", choices=(), label=None)

    def test_no_file(self, tmp_path):
        with pytest.raises(DataError) as caught:
            Task.load(tmp_path / "nope.yaml")
        given = (f"no task file at {tmp_path / 'nope.yaml'}",)
        assert_says(
            caught.value, given=given, expected=None, do="the path of a YAML task file, or a shipped task's name"
        )

    @pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\tname: x", "'"])
    def test_not_yaml(self, tmp_path, text):
        path = tmp_path / "t.yaml"
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            Task.load(path)
        assert caught.value.given.startswith(f"{path} is not valid YAML: ")

    @pytest.mark.parametrize("text", ["", "[]", "just text", "- a\n- b"])
    def test_yaml_without_fields(self, tmp_path, text):
        path = tmp_path / "t.yaml"
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            Task.load(path)
        expected = "YAML with name, version, prompt and choices"
        assert_says(caught.value, given=(f"{path} holds no fields",), expected=expected, do=None)

    def test_all_faulty_fields_are_named_at_once(self, tmp_path):
        path = write(tmp_path / "t.yaml", {"version": 0, "choices": ["a", "b"], "promt": "x", "label": 3})
        with pytest.raises(DataError) as caught:
            Task.load(path)
        given = (
            f"task file {path}: ",
            "name: Field required",
            "prompt: Field required",
            "promt: Extra inputs are not permitted",
            "version: Input should be greater than or equal to 1",
            "label: Input should be a valid string",
        )
        assert_says(caught.value, given=given, expected=None, do="see the shipped tasks for examples")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"choices": None}, "either 'choices' or a free-text 'answer' template"),
            ({"answer": "{text}"}, "either 'choices' or a free-text 'answer' template"),
            ({"choices": []}, "'choices' needs at least two different answers"),
            ({"choices": ["yes"]}, "'choices' needs at least two different answers"),
            ({"choices": ["yes", "yes"]}, "'choices' needs at least two different answers"),
            ({"choices": ["yes", " "]}, "'choices' holds an empty answer"),
        ],
    )
    def test_answers_that_cannot_be_distinguished(self, tmp_path, change, reason):
        with pytest.raises(DataError) as caught:
            Task.load(write(tmp_path / "t.yaml", {**CHOICE, **change}))
        assert_says(caught.value, given=("task file", reason), expected=None, do="see the shipped tasks for examples")


class TestExample:
    @pytest.mark.parametrize(
        ("fields", "row", "absent"),
        [
            (CHOICE, {"id": 5, "label": 1}, "text"),
            (CHOICE, {"id": 5, "text": "x"}, "label"),
            ({**CHOICE, "label": "gold"}, {"id": 5, "text": "x", "label": 1}, "gold"),
            ({**CHOICE, "choices": "endings"}, {"id": 5, "text": "x", "label": 1}, "endings"),
            (FREE, {"id": 5, "text": "x"}, "times"),
        ],
    )
    def test_a_field_that_the_row_does_not_have(self, fields, row, absent):
        with pytest.raises(DataError) as caught:
            Task.model_validate(fields).example(row)
        given = (f"task '{fields['name']}' needs the field '{absent}', which row 5 does not have",)
        do = f"use one of the row's fields: {', '.join(sorted(row))}"
        assert_says(caught.value, given=given, expected=None, do=do)

    @pytest.mark.parametrize("prompt", ["{text:d}", "{text:>{width}}"])
    def test_a_format_that_a_field_does_not_fit(self, prompt):
        with pytest.raises(DataError, match="cannot be filled with the fields"):
            Task.of(name="t", version=1, prompt=prompt, choices=["a", "b"]).example({"text": "x", "label": 0})

    @pytest.mark.parametrize("label", [2, -1, "1", 1.0, None])
    def test_a_label_that_is_no_choice(self, label):
        with pytest.raises(DataError) as caught:
            Task.model_validate({**CHOICE, "label": "gold"}).example({"text": "x", "gold": label, "id": "r-9"})
        assert_says(
            caught.value,
            given=(f"task 'mood': label {label!r} of row r-9",),
            expected="a whole number from 0 to 1",
            do="correct the field 'gold' in the data",
        )

    @pytest.mark.parametrize("ends", ["ab", ["a"], ["a", 1], None])
    def test_a_rows_own_choices_that_are_none(self, ends):
        with pytest.raises(DataError) as caught:
            Task.model_validate({**CHOICE, "choices": "ends"}).example({"text": "x", "label": 0, "ends": ends})
        given = (f"task 'mood': the field 'ends' is {ends!r}",)
        assert_says(caught.value, given=given, expected="a list of at least two texts", do="correct this field")

    def test_a_label_beyond_the_rows_own_choices(self):
        row = {"text": "x", "label": 2, "ends": ["a", "b"]}
        with pytest.raises(DataError) as caught:
            Task.model_validate({**CHOICE, "choices": "ends"}).example(row)
        given = ("task 'mood': label 2",)
        assert_says(caught.value, given=given, expected="a whole number from 0 to 1", do="correct the field 'label'")


class TestRows:
    def test_jsonl_below_a_root_by_full_path_and_limited(self, tmp_path):
        rows = [{"text": f"é {i}", "label": i} for i in range(5)]
        (tmp_path / "d").mkdir()
        path = tmp_path / "d" / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
        assert read_rows("d/rows.jsonl", root=tmp_path) == rows
        assert read_rows(str(path), root="/nowhere") == rows
        assert read_rows(str(path), limit=2) == rows[:2]

    def test_no_file(self, tmp_path):
        with pytest.raises(DataError) as caught:
            read_rows("d/rows.jsonl", root=tmp_path)
        given = (f"no data file at {tmp_path / 'd' / 'rows.jsonl'}",)
        assert_says(caught.value, given=given, expected=None, do="--data-root, or its full path")

    @pytest.mark.parametrize("text", ["", "\n \n"])
    def test_an_empty_file(self, tmp_path, text):
        path = tmp_path / "rows.jsonl"
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            read_rows(str(path))
        assert_says(
            caught.value, given=(f"{path} holds no rows",), expected="one JSON object per line", do="check the file"
        )

    def test_a_line_that_is_not_json_is_named_by_its_number(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"a": 1}\n\n{"a": 2\n')
        with pytest.raises(DataError) as caught:
            read_rows(str(path))
        assert_says(
            caught.value, given=(f"{path}, line 3: ",), expected="one JSON object per line", do="correct that line"
        )

    @pytest.mark.parametrize(("line", "kind"), [("[1]", "list"), ("3", "int"), ('"x"', "str"), ("null", "NoneType")])
    def test_a_line_that_is_not_an_object_is_named_by_its_number(self, tmp_path, line, kind):
        path = tmp_path / "rows.jsonl"
        path.write_text(f'{{"a": 1}}\n{line}\n')
        with pytest.raises(DataError) as caught:
            read_rows(str(path))
        assert_says(
            caught.value, given=(f"{path}, line 2: a {kind}",), expected="a JSON object", do="correct that line"
        )

    @pytest.mark.parametrize("source", ["hub:imdb", "hub:a:b:c:d"])
    def test_a_hub_source_of_another_form(self, hub, source):
        with pytest.raises(DataError) as caught:
            read_rows(source)
        given = (f"data source '{source}'",)
        expected = "hub:<dataset>:<split> or hub:<dataset>:<config>:<split>"
        assert_says(caught.value, given=given, expected=expected, do=None)
        assert hub.asked == []

    @pytest.mark.parametrize(
        ("source", "asked"),
        [("hub:org/d:train", ("org/d", "split=train")), ("hub:org/d:en:test", ("org/d", "en", "split=test"))],
    )
    def test_hub_rows(self, hub, source, asked):
        assert read_rows(source, limit=2) == [{"a": 1}, {"a": 2}]
        assert hub.asked == [asked]

    def test_a_hub_dataset_that_cannot_be_reached(self, hub):
        hub.rows = None
        with pytest.raises(DataError) as caught:
            read_rows("hub:org/d:train")
        given = ("the Hub dataset hub:org/d:train could not be loaded: no network here",)
        assert_says(caught.value, given=given, expected=None, do="check its name and the network")

    def test_a_hub_dataset_without_rows(self, hub):
        hub.rows = []
        with pytest.raises(DataError, match="hub:org/d:train holds no rows"):
            read_rows("hub:org/d:train")

    def test_hub_rows_without_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError) as caught:
            read_rows("hub:org/d:train")
        given = ("reading a Hub dataset needs the extra 'train'",)
        assert_says(caught.value, given=given, expected=None, do='pip install "spectr-lora[train]"')


@pytest.mark.parametrize("name", SHIPPED)
def test_paraphrases_of_shipped_tasks_ask_the_same_rows(name):
    task = Task.shipped(name)
    assert len(set(task.paraphrases)) == 3
    plain = task.example(task.sample)
    for number in range(3):
        other = task.reworded(number).example(task.sample)
        assert other.prompt != plain.prompt
        assert (other.choices, other.label, other.answer) == (plain.choices, plain.label, plain.answer)
