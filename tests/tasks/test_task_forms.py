"""What a task file can say beyond prompt and choices: metric, lettered options, data on the Hub."""

from __future__ import annotations

import json
import sys

import pytest

from adapters_on_disk import assert_says
from spectr.errors import DataError
from spectr.tasks import Example, Task, data_source, read_examples, shipped_tasks

CHOICE = {"name": "mood", "version": 1, "prompt": "Is it good?\n{text}", "choices": ["no", "yes"]}
FREE = {"name": "echo", "version": 1, "prompt": "Say {text}", "answer": "{text}"}
LETTERS = {"letters": "Pick one.\n{text}\n{options}"}


@pytest.fixture
def hub(monkeypatch):
    """Stands for the package 'datasets': rows by the names that they are asked for with."""

    class Hub:
        def __init__(self):
            self.rows = {}

        def load_dataset(self, *names, split):
            return self.rows[(*names, split)]

    stand_in = Hub()
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return stand_in.rows


class TestMetric:
    @pytest.mark.parametrize(("fields", "metric"), [(CHOICE, "accuracy"), (FREE, "exact_match")])
    def test_the_default_is_that_of_the_answers(self, fields, metric):
        assert Task.of(**fields).metric == metric
        assert Task.of(**fields, metric=None).metric == metric

    def test_another_one(self):
        assert Task.of(**FREE, metric="rougeL").metric == "rougeL"

    @pytest.mark.parametrize(
        ("fields", "metric", "message"),
        [
            (FREE, "rouge", "unknown metric 'rouge'; did you mean 'rouge"),
            (CHOICE, "acuracy", "did you mean 'accuracy'? known: accuracy, exact_match, rouge1, rouge2, rougeL"),
            (
                FREE,
                "accuracy",
                "for choices, but this task's answer is free text: use exact_match, rouge1, rouge2, rou",
            ),
            (CHOICE, "rouge1", "metric 'rouge1' is for free text, but this task has choices: use accuracy"),
            (CHOICE, "exact_match", "metric 'exact_match' is for free text"),
        ],
    )
    def test_one_that_does_not_fit(self, fields, metric, message):
        with pytest.raises(DataError) as caught:
            Task.of(**fields, metric=metric)
        assert_says(caught.value, given=("this task: ", message), expected=None, do="see the shipped tasks")

    def test_all_that_is_wrong_is_reported_at_once(self):
        with pytest.raises(DataError) as caught:
            Task.of(version=1, prompt="{", choices=["a", "a"], metric="bleu", letters="none", max_new_tokens=0, hub={})
        for message in (
            "name: Field required",
            "unknown metric 'bleu'",
            "'{' has wrong braces",
            "at least two different answers",
            "'letters' needs {options}",
            "max_new_tokens: Input should be greater than or equal to 1",
        ):
            assert message in caught.value.given


class TestLetters:
    def test_options_of_the_task(self):
        task = Task.of(**CHOICE, **LETTERS, length_normalised=True, paraphrases=["{text}?"]).lettered()
        assert task.example({"text": "Fine {x}.", "label": 1}) == Example(
            prompt="Pick one.\nFine {x}.\nA. no\nB. yes", answer="B", choices=("A", "B"), label=1
        )
        assert (task.title, task.paraphrases, task.length_normalised) == ("mood v1, lettered", (), False)

    def test_options_of_the_row(self):
        task = Task.of(**CHOICE | {"choices": "ends"}, **LETTERS).lettered()
        example = task.example({"text": "t", "ends": ["x", "{y}", "z"], "options": "not these", "label": 2})
        assert example == Example(
            prompt="Pick one.\nt\nA. x\nB. {y}\nC. z", answer="C", choices=("A", "B", "C"), label=2
        )

    def test_a_task_without(self):
        with pytest.raises(DataError) as caught:
            Task.of(**CHOICE).lettered()
        given = ("task 'mood' has no form with lettered options",)
        assert_says(caught.value, given=given, expected="'letters' with {options}", do="remove --letters")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({**CHOICE, "form": "letters"}, "'form' is letters, but there is no template 'letters'"),
            ({**FREE, **LETTERS}, "'letters' lists choices, but this task has none"),
            ({**CHOICE, "letters": "{text}"}, "'letters' needs {options}, which the lettered choices replace"),
            ({**CHOICE, "letters": "{options} {a b}"}, "wrong braces"),
        ],
    )
    def test_a_template_that_cannot_be(self, fields, message):
        with pytest.raises(DataError) as caught:
            Task.of(**fields)
        assert message in caught.value.given

    def test_more_options_than_letters(self):
        task = Task.of(**CHOICE | {"choices": "ends"}, **LETTERS).lettered()
        with pytest.raises(DataError) as caught:
            task.example({"text": "t", "ends": [str(i) for i in range(27)], "label": 0})
        assert_says(caught.value, given=("task 'mood': 27 choices",), expected="at most 26", do="remove --letters")

    def test_a_wrong_label(self):
        with pytest.raises(DataError) as caught:
            Task.of(**CHOICE, **LETTERS).lettered().example({"text": "t", "label": 2})
        assert_says(caught.value, given=("label 2",), expected="a whole number from 0 to 1", do="the field 'label'")

    @pytest.mark.parametrize("name", shipped_tasks())
    def test_every_shipped_task_has_them(self, name):
        task = Task.shipped(name)
        words, letters = task.example(task.sample), task.lettered().example(task.sample)
        assert letters.label == words.label
        assert letters.answer == "ABCDEFGHIJKLMN"[words.label]
        assert letters.prompt.splitlines()[-len(words.choices) :] == [
            f"{letter}. {choice}" for letter, choice in zip(letters.choices, words.choices, strict=True)
        ]
        texts = [value for value in task.sample.values() if isinstance(value, str)]
        assert all(text in letters.prompt for text in texts)


class TestHub:
    def test_every_shipped_task_has_its_data_there(self, hub):
        """Rows with the fields that the Hub's data sets have; their label numbers mean the same as in our files."""
        glue = {
            "cola": ("sentence",),
            "sst2": ("sentence",),
            "mrpc": ("sentence1", "sentence2"),
            "qqp": ("question1", "question2"),
            "qnli": ("question", "sentence"),
            "mnli": ("premise", "hypothesis"),
        }
        for name, fields in glue.items():
            for split in ("train", "validation_matched" if name == "mnli" else "validation"):
                hub["nyu-mll/glue", name, split] = [{**dict.fromkeys(fields, "WORDS"), "label": 1, "idx": 0}]
        for split in ("train", "test"):
            hub["fancyzhx/ag_news", split] = [{"text": "WORDS", "label": 1}]
            hub["fancyzhx/dbpedia_14", split] = [{"label": 1, "title": "T", "content": "WORDS"}]
        for split in ("train", "validation"):
            row = {"activity_label": "A", "ctx": "WORDS", "endings": ["p", "q", "r", "s"], "label": "1"}
            hub["Rowan/hellaswag", split] = [row]
        for task in shipped_tasks().values():
            for part in ("train", "test"):
                [example] = read_examples(task, data_source(task, part, "hub"), root="hub")
                assert example.label == 1
                assert "WORDS" in example.prompt

    def test_fields_are_made_and_a_label_becomes_a_number(self, hub):
        hub["org/d", "en", "train"] = [{"body": "b", "label": "1"}]
        task = Task.of(**CHOICE, hub={"train": "hub:org/d:en:train", "fields": {"text": "{body}!", "more": ""}})
        [example] = read_examples(task, data_source(task, "train", "hub"))
        assert (example.prompt, example.label) == ("Is it good?\nb!", 1)

    @pytest.mark.parametrize("label", ["", "-1", -1, "one", 2])
    def test_a_label_that_is_no_choice(self, hub, label):
        hub["org/d", "test"] = [{"text": "b", "label": label}]
        task = Task.of(**CHOICE, hub={"test": "hub:org/d:test"})
        with pytest.raises(DataError) as caught:
            read_examples(task, "hub:org/d:test")
        given = (f"hub:org/d:test, row 1: task 'mood': label {label!r}",)
        assert_says(caught.value, given=given, expected="from 0 to 1", do="correct the field 'label'")

    def test_rows_sorted_by_label_are_shuffled_always_alike(self, hub):
        rows = [{"text": str(i), "label": i // 50} for i in range(100)]
        hub["org/d", "test"] = rows
        task = Task.of(**CHOICE, hub={"test": "hub:org/d:test"})
        some = read_examples(task, "hub:org/d:test", limit=20)
        assert {example.label for example in some} == {0, 1}
        assert len({example.prompt for example in some}) == 20
        assert some == read_examples(task, "hub:org/d:test")[:20]
        other = Task.of(**CHOICE)
        assert [e.label for e in read_examples(other, "hub:org/d:test", limit=20)] == [0] * 20, "only a task's own are"

    def test_a_file_is_read_as_it_is_and_a_source_of_its_own_stays(self, hub):
        task = Task.of(**CHOICE, test="hub:org/d:test", train="a.jsonl", hub={"train": "hub:org/e:train"})
        assert data_source(task, "test", "hub") == "hub:org/d:test"
        assert data_source(task, "train", "hub") == "hub:org/e:train"
        assert data_source(task, "train", "folder") == "a.jsonl"
        assert data_source(task, "train") == "a.jsonl"

    def test_a_task_that_names_none(self):
        task = Task.of(**CHOICE, test="a.jsonl", hub={"train": "hub:org/e:train"})
        with pytest.raises(DataError) as caught:
            data_source(task, "test", "hub")
        given = ("task 'mood' has no test data on the Hub",)
        assert_says(caught.value, given=given, expected="hub: {test:", do="use a folder as --data-root")

    def test_a_hub_entry_with_faults(self):
        with pytest.raises(DataError) as caught:
            Task.of(**CHOICE, hub={"train": "org/d:train", "test": "hub:d", "fields": {"text": "{"}, "more": 1})
        for message in (
            "hub.train: 'org/d:train' is not of the form hub:<dataset>[:<config>]:<split>",
            "hub.test: 'hub:d' is not",
            "hub.fields: the template '{' has wrong braces",
            "hub.more: Extra inputs are not permitted",
        ):
            assert message in caught.value.given


class TestAllProblemsOfAFile:
    def test_every_bad_row_in_one_error(self, tmp_path):
        rows = ['{"text": "a", "label": 5}', "nonsense", '{"label": 0}', '{"text": "b", "label": 1}']
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(rows))
        with pytest.raises(DataError) as caught:
            read_examples(Task.of(**CHOICE), str(path))
        text = str(caught.value)
        assert text.startswith(f"{path}: 3 problems\n")
        assert f"- {path}, row 1: task 'mood': label 5\n  expected: a whole number from 0 to 1" in text
        assert f"- {path}, line 2: Expecting value" in text
        assert f"- {path}, row 3: task 'mood' needs the field 'text'" in text

    def test_the_first_few_in_full_then_a_count(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"text": "a", "label": 7}) for _ in range(12)))
        with pytest.raises(DataError) as caught:
            read_examples(Task.of(**CHOICE), str(path))
        text = str(caught.value)
        assert (text.count("label 7"), "row 5:" in text, "row 6:" in text) == (5, True, False)
        assert text.endswith("\n- and 7 more")

    def test_rows_beyond_the_limit_are_not_read(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"text": "a", "label": 1}\nnonsense\n')
        assert len(read_examples(Task.of(**CHOICE), str(path), limit=1)) == 1

    def test_one_problem_is_reported_by_itself(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"text": "a", "label": 5}\n')
        with pytest.raises(DataError) as caught:
            read_examples(Task.of(**CHOICE), str(path))
        given = (f"{path}, row 1: task 'mood': label 5",)
        assert_says(caught.value, given=given, expected="from 0 to 1", do="correct the field 'label'")
