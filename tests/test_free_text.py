"""Free-text tasks, lettered ones, prompts longer than the context, and what is checked before anything is scored."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import BloomConfig, GPT2Config

from adapters_on_disk import assert_says
from models import peft_library
from spectr import Calibrated, Oracle, Spectr, calibrate, compose
from spectr.errors import DataError, MissingExtraError
from spectr.evaluation import choice_logprobs, routed_logprobs, text_metric
from spectr.evaluation.encode import encode_examples
from spectr.evaluation.experiments import EXPERIMENTS, Bench
from spectr.evaluation.score import score_examples, score_of
from spectr.models import context_length, encode_answer, encode_prompt, generate_answers
from spectr.tasks import Example, Task
from text_model import make_model, make_tokenizer, save_experts, save_model

PROMPTS = ["what is it", "is the grass blue", "who", "a good film of the sky is the x", "is it red", "the z of y"]
FREE = [Example(prompt=prompt, answer="the sky is blue") for prompt in PROMPTS]
CHOICES = [Example(prompt=prompt, answer="yes", choices=("yes", "no"), label=0) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    plain = peft_library(make_model(), tmp_path_factory.mktemp("experts"), {"ants": 4, "bees": 2, "cats": 4})
    return plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), samples=3))


def short_model(context: int):
    model = make_model()
    model.config.max_position_embeddings = context
    return model


# Metrics


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Paris", "paris", 1.0),
        (" The  capital,\nof France. ", "capital of france", 1.0),
        ("Paris", "Paris is", 0.0),
        ("theatre", "atre", 0.0),
        ("a", "the", 0.0),
        ("%", "$", 0.0),
        ("A.", "a", 0.0),
        ("", "Paris", 0.0),
        ("", "", 1.0),
    ],
)
def test_exact_match_is_that_of_squad(answer, reference, score):
    assert text_metric("exact_match")(answer, reference) == score


@pytest.mark.parametrize(
    ("metric", "score"),
    [
        ("rouge1", 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)),  # cat, sat and down are shared
        ("rouge2", 2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4)),  # "sat down"
        ("rougeL", 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)),
    ],
)
def test_rouge_is_the_f_measure(metric, score):
    assert text_metric(metric)("cats quietly sat down", "my cat then sat down") == pytest.approx(score)


def test_the_longest_common_subsequence_keeps_the_order():
    assert text_metric("rouge1")("down sat cat", "cat sat down") == pytest.approx(1.0)
    assert text_metric("rougeL")("down sat cat", "cat sat down") == pytest.approx(1 / 3)


def test_a_metric_that_is_not_for_free_text():
    with pytest.raises(DataError) as caught:
        text_metric("rougel")
    given = ("metric 'rougel' does not measure free text",)
    assert_says(caught.value, given=given, expected=None, do="did you mean 'rougeL'?")


def test_rouge_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingExtraError) as caught:
        text_metric("rouge1")
    given = ("the metric rouge1 needs the extra 'evaluate'",)
    assert_says(caught.value, given=given, expected=None, do='pip install "spectr-lora[evaluate]"')


# Answers and their records


def test_answers_of_a_batch_are_those_of_each_prompt_alone():
    records = score_examples(make_model(), make_tokenizer(), FREE, metric="rougeL", max_new_tokens=5)
    measure = text_metric("rougeL")
    for record, example in zip(records, FREE, strict=True):
        [alone] = generate_answers(make_model(), make_tokenizer(), [example.prompt], max_new_tokens=5)
        assert (record["answer"], record["reference"]) == (alone, example.answer)
        assert score_of(record) == pytest.approx(measure(alone, example.answer), abs=1e-4)
    assert len({record["answer"] for record in records}) > 1


def test_a_right_answer_scores_one():
    [answer] = generate_answers(make_model(), make_tokenizer(), PROMPTS[:1], max_new_tokens=3)
    examples = [Example(prompt=PROMPTS[0], answer=text) for text in (answer.upper() + ".", answer + " z")]
    records = score_examples(make_model(), make_tokenizer(), examples, metric="exact_match", max_new_tokens=3)
    assert [score_of(record) for record in records] == [1.0, 0.0]


@pytest.mark.parametrize("router", [Spectr(top_k=2), Calibrated()], ids=["token", "prompt"])
def test_a_routed_model_answers_as_it_does_prompt_by_prompt(library, router):
    routed = compose(make_model(), library, router)
    model = routed.model
    records = score_examples(
        model, make_tokenizer(), FREE, metric="exact_match", max_new_tokens=4, decision=routed.prompt
    )
    for record, example in zip(records, FREE, strict=True):
        [alone] = generate_answers(model, make_tokenizer(), [example.prompt], max_new_tokens=4)
        assert record["answer"] == alone
        assert ("experts" in record) == (routed.prompt is not None)
        if routed.prompt:
            [row] = routed.prompt.weights_BE
            assert record["experts"] == {routed.experts[int(row.argmax())]: 1.0}


def test_a_killed_run_goes_on_and_answers_nothing_twice(tmp_path, monkeypatch):
    import spectr.evaluation.score as module

    monkeypatch.setattr(module, "_CHUNK", 2)
    path, seen = tmp_path / "records.jsonl", []
    given = {"metric": "rouge1", "max_new_tokens": 3, "keep": path, "origin": {"form": "free"}}
    whole = score_examples(make_model(), make_tokenizer(), FREE, **given | {"keep": None})

    def dies(count):
        seen.append(count)
        if sum(seen) >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_examples(make_model(), make_tokenizer(), FREE, progress=dies, **given)
    path.write_text(path.read_text()[:-5])
    again = []
    assert score_examples(make_model(), make_tokenizer(), FREE, progress=again.append, **given) == whole
    assert again[0] == 3
    head, *lines = map(json.loads, path.read_text().splitlines())
    assert head["origin"] == {"form": "free"}
    assert sorted(line["number"] for line in lines) == list(range(6))


@pytest.mark.parametrize("change", [{"metric": "rouge2"}, {"max_new_tokens": 2}, {"examples": CHOICES[:0]}])
def test_records_by_another_metric_length_or_reference_are_not_taken(tmp_path, change):
    given = {"metric": "rouge1", "max_new_tokens": 3, "keep": tmp_path / "records.jsonl"}
    score_examples(make_model(), make_tokenizer(), FREE, **given)
    seen = []
    examples = [Example(prompt=e.prompt, answer="no") for e in FREE] if "examples" in change else FREE
    more = given | {key: value for key, value in change.items() if key != "examples"}
    score_examples(make_model(), make_tokenizer(), examples, progress=seen.append, **more)
    assert seen[0] == 0


@pytest.mark.parametrize(("examples", "metric"), [(FREE, "accuracy"), (CHOICES, "rouge1")])
def test_a_metric_and_examples_that_do_not_go_together(examples, metric):
    with pytest.raises(DataError) as caught:
        score_examples(make_model(), make_tokenizer(), examples, metric=metric)
    given = (f"metric '{metric}' and examples with",)
    assert_says(caught.value, given=given, expected="accuracy for choices", do=None)


# Prompts longer than the context

LONG = "red " * 30 + "what is the sky"


def test_a_long_prompt_loses_the_first_of_the_users_own_tokens():
    tokenizer = make_tokenizer()
    whole = encode_prompt(tokenizer, LONG)
    cut = encode_prompt(tokenizer, LONG, limit=10)
    assert (cut[:1], cut[1:]) == (whole[:1], whole[-9:])  # the template opens with one token
    assert encode_prompt(tokenizer, LONG, limit=len(whole)) == whole
    tokenizer.chat_template = None
    assert encode_prompt(tokenizer, LONG, limit=4) == tokenizer("what is the sky")["input_ids"]


def test_no_room_for_a_prompt():
    with pytest.raises(DataError) as caught:
        encode_prompt(make_tokenizer(), LONG, limit=1)
    given = ("there is room for 1 tokens of a prompt, and the chat template's opening takes 1",)
    assert_says(caught.value, given=given, expected=None, do="shorten the answers")


def test_the_context_is_that_of_the_language_model():
    assert context_length(short_model(12)) == 12
    assert context_length(SimpleNamespace(config=GPT2Config(n_positions=9))) == 9
    assert context_length(SimpleNamespace(config=BloomConfig())) is None


def test_choices_are_scored_on_what_is_left_of_the_prompt():
    tokenizer, model = make_tokenizer(), short_model(16)
    example = Example(prompt=LONG, answer="no", choices=("no", "a good film"), label=0)
    others = [example, *CHOICES[:2]]
    [found, *_] = choice_logprobs(model, tokenizer, others)
    prompt = encode_prompt(tokenizer, LONG, limit=16 - 4)  # "a good film" and the end are four tokens
    assert len(prompt) == 12
    for choice, score in zip(example.choices, found.tolist(), strict=True):
        answer = encode_answer(tokenizer, choice)
        logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        slow = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        assert score == pytest.approx(slow, abs=1e-4)
    records = score_examples(model, tokenizer, others)
    assert [record.get("lost") for record in records] == [len(encode_prompt(tokenizer, LONG)) - 12, None, None]


def test_a_decision_for_a_long_prompt_is_that_for_what_is_left(library):
    model, tokenizer = short_model(12), make_tokenizer()
    routed = compose(model, library, Calibrated())
    long = Example(prompt=LONG, answer="yes", choices=("yes", "no"), label=0)
    _, [row] = routed_logprobs(model, tokenizer, [long], routed.prompt)
    left = torch.tensor([encode_prompt(tokenizer, LONG, limit=10)])
    [expected] = routed.prompt.decide(input_ids=left, attention_mask=torch.ones_like(left))
    assert torch.equal(row, expected)


def test_an_answer_has_its_room():
    model, tokenizer = short_model(16), make_tokenizer()
    [record] = score_examples(
        model, tokenizer, [Example(prompt=LONG, answer="x")], metric="exact_match", max_new_tokens=4
    )
    [alone] = generate_answers(model, tokenizer, [LONG], max_new_tokens=4, limit=12)
    assert (record["answer"], record["lost"]) == (alone, len(encode_prompt(tokenizer, LONG)) - 12)


# What is checked before anything is scored


def test_choices_without_tokens_or_room_are_named_together():
    tokenizer = make_tokenizer()
    examples = [
        CHOICES[0],
        Example(prompt="what", answer="no", choices=("no", " \t"), label=0),
        Example(prompt="what", answer="no", choices=("no", "red " * 20), label=0),
    ]
    with pytest.raises(DataError) as caught:
        encode_examples(tokenizer, examples, 20, name="moods")
    text = str(caught.value)
    assert text.startswith("task 'moods': 2 problems\n")
    assert (
        "- task 'moods', example 2: the choice ' \\t' has no tokens\n  expected: choices of one token or more" in text
    )
    assert "example 3: the choice 'red red red red red red red red red red '... has 21 tokens" in text
    assert "expected: choices that leave room for a prompt in the model's context of 20 tokens" in text
    with pytest.raises(DataError) as caught:
        encode_examples(tokenizer, examples[:2], None)
    assert_says(caught.value, given=("example 2: the choice",), expected="one token", do="correct the choices")


def bench(tmp_path, library, model=None, **tasks):
    return Bench(model=model or make_model(), tokenizer=make_tokenizer(), library=library, tasks=tasks, folder=tmp_path)


def test_a_bench_names_what_is_wrong_with_all_its_tasks(tmp_path, library, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    task = Task.of(name="ants", version=1, prompt="{x}", choices=("yes", "no"))
    free = Task.of(name="bees", version=1, prompt="{x}", answer="{x}", metric="rouge1")
    wrong = [Example(prompt="what", answer="no", choices=("no", " "), label=0)]
    with pytest.raises(DataError, match=r"2 problems\n- task 'ants', example 1: the choice(.|\n)*needs the extra"):
        bench(tmp_path, library, ants=(task, wrong), bees=(free, FREE)).check()
    bench(tmp_path, library, ants=(task, CHOICES), nobody=(task, wrong)).check()


# Experiments


def test_quality_and_multitask_serve_both_kinds(tmp_path, library):
    choices = Task.of(name="ants", version=1, prompt="{x}", choices=("yes", "no"))
    free = Task.of(name="bees", version=1, prompt="{x}", answer="{x}", metric="rougeL", max_new_tokens=3)
    long = [Example(prompt=LONG, answer="yes", choices=("yes", "no"), label=0), *CHOICES]
    given = bench(tmp_path, library, short_model(16), ants=(choices, long), bees=(free, FREE))
    result = EXPERIMENTS["quality"](given)
    [ants, bees] = result.rows
    assert (ants[2], bees[2]) == ("100.0%", "")  # the majority class is for choices
    assert "bees is free text, measured by rougeL." in result.notes
    assert (
        "1 prompt of ants left no room for the answer in the model's 16 tokens and lost their beginning."
        in result.notes
    )
    assert result.origin["tasks"] == {"ants": "v1, 7 examples", "bees": "v1, rougeL, 6 examples"}
    with given.routed(Oracle(expert="bees")) as routed:
        scores = [
            score_of(r) for r in score_examples(routed.model, given.tokenizer, FREE, metric="rougeL", max_new_tokens=3)
        ]
    assert result.data["expert"][1] == pytest.approx(sum(scores) / len(scores), abs=1e-4)
    [line, *_] = (tmp_path / "records" / "bees, rougeL--base.jsonl").read_text().splitlines()[1:]
    assert {"answer", "reference", "score"} <= set(json.loads(line))
    methods = EXPERIMENTS["multitask"](given).data["methods"]
    assert methods["base"]["accuracy"]["bees"] == pytest.approx(result.data["base"][1])
    assert {"spectr, k 2", "calibrated, k 1"} <= set(methods)


# The commands


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


def test_letters_from_the_command_line(spectr, world, tmp_path):
    for letters in ((), ("--letters",)):
        code, *_ = evaluate(spectr, world, "quality", "--task", "both.yaml", "--out", tmp_path, *letters)
        assert code == 0
    made = json.loads((tmp_path / "quality.json").read_text())
    assert made["origin"]["tasks"] == {"both": "v1, lettered, 8 examples"}
    assert "--letters" in made["origin"]["command"]
    assert "Options are lettered, the answer is a letter: both." in made["notes"]
    records = {path.name for path in (tmp_path / "records").iterdir()}
    assert {"both--base.jsonl", "both, lettered--base.jsonl"} <= records
    code, text, notes = evaluate(spectr, world, "all", "--task", "both.yaml", "--out", tmp_path, "--letters")
    assert code == 0, text
    assert "wording is left out, as lettered options have no paraphrases" in notes


def test_training_with_letters_says_so_on_the_card(spectr, world, tmp_path):
    pytest.importorskip("peft")
    words = ("train", "--task", world / "both.yaml", "--letters", "-o", tmp_path / "e", "--model", world / "model")
    assert spectr(*words)[0] == 0
    assert json.loads((tmp_path / "e" / "expert.json").read_text())["data"]["task"] == "both v1, lettered"


def test_data_from_the_hub_by_one_setting(spectr, world, tmp_path, monkeypatch):
    class Hub:
        asked: list = []  # noqa: RUF012

        def load_dataset(self, *names, split):
            self.asked.append((*names, split))
            return [{"sentence": "the film is good", "label": i % 2} for i in range(4)]

    monkeypatch.setitem(sys.modules, "datasets", Hub())
    words = ("train", "--task", "sst2", "--data-root", "hub", "-o", tmp_path / "e", "--model", world / "model")
    code, text, _ = spectr(*words)
    assert code == 0
    assert "on 4 test rows" in text
    assert Hub.asked == [("nyu-mll/glue", "sst2", "train"), ("nyu-mll/glue", "sst2", "validation")]
    card = json.loads((tmp_path / "e" / "expert.json").read_text())
    assert card["data"]["train"] == "hub:nyu-mll/glue:sst2:train"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("quality", "--task", "words.yaml", "--letters"), "task 'words' has no form with lettered options"),
        (("wording", "--task", "both.yaml", "--letters"), "lettered options have no paraphrases to do: leave out"),
        (("wording", "--task", "words.yaml"), "none of these tasks has paraphrases to do: add 'paraphrases'"),
        (("quality", "--task", "words.yaml", "--data-root", "hub"), "task 'words' names no test data on the Hub"),
        (("quality", "--task", "words.yaml", "--task", "none.yaml"), "task 'none' belongs to the expert 'bleu', which"),
        (("quality", "--task", "none.yaml"), "expected: one of amber, blue to do: add it with spectr library add bleu"),
        (("quality", "--task", "none.yaml", "--task", "lost.yaml"), "tasks without an expert: 2 problems"),
    ],
)
def test_mistakes_get_one_message(spectr, world, tmp_path, words, message):
    code, text, notes = evaluate(spectr, world, *words, "--out", tmp_path / "out")
    assert (code, text) == (2, "")
    assert message in " ".join(notes.split())
    assert not (tmp_path / "out").exists()


def test_without_task_those_whose_expert_is_absent_are_left_out(spectr, world, tmp_path, monkeypatch):
    import spectr.tasks as package

    tasks = {name: Task.load(world / f"{name}.yaml") for name in ("words", "lost")}
    monkeypatch.setattr(package, "shipped_tasks", lambda: tasks)
    code, text, notes = evaluate(spectr, world, "quality", "--out", tmp_path)
    assert code == 0
    assert "left out, as the library has no expert for them: lost" in notes
    assert "words" in text
