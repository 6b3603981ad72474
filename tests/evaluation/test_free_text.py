"""Free-text tasks, prompts longer than the context, and what is checked before anything is scored."""

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
from spectr.evaluation.choices import encode_examples
from spectr.evaluation.experiments import EXPERIMENTS, ExperimentSetup
from spectr.evaluation.expert_recall import find_experts
from spectr.evaluation.score import score_examples, score_of
from spectr.models import context_length, encode_answer, encode_prompt, generate_answers
from spectr.tasks import Example, Task
from text_model import make_model, make_tokenizer

PROMPTS = ["what is it", "is the grass blue", "who", "a good film of the sky is the x", "is it red", "the z of y"]
FREE = [Example(prompt=prompt, answer="the sky is blue") for prompt in PROMPTS]
CHOICES = [Example(prompt=prompt, answer="yes", choices=("yes", "no"), label=0) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    plain = peft_library(make_model(), tmp_path_factory.mktemp("experts"), {"ants": 4, "bees": 2, "cats": 4})
    return plain.with_calibration(calibrate(make_model(), plain, make_tokenizer(), samples=3, null=0))


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
    other = "exact_match, rouge1" if metric == "accuracy" else "use another metric: accuracy"
    assert_says(caught.value, given=given, expected="accuracy for choices", do=other)


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
    given = ("there is room for 1 tokens of a prompt, but the chat template's opening takes 1",)
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


def test_a_decision_for_a_long_prompt_is_that_for_what_is_left(library, monkeypatch):
    model, tokenizer = short_model(12), make_tokenizer()
    routed = compose(model, library, Calibrated())
    long = Example(prompt=LONG, answer="yes", choices=("yes", "no"), label=0)
    seen, decide = [], routed.prompt.decide
    monkeypatch.setattr(routed.prompt, "decide", lambda **given: seen.append(given["input_ids"]) or decide(**given))
    _, [row] = routed_logprobs(model, tokenizer, [long], routed.prompt)
    left = torch.tensor([encode_prompt(tokenizer, LONG, limit=12 - 2)])
    assert torch.equal(seen[0], left)
    [expected] = decide(input_ids=left, attention_mask=torch.ones_like(left))
    assert torch.equal(row, expected)


def test_experts_are_looked_for_within_the_context(library):
    model, tokenizer, widths = short_model(12), make_tokenizer(), []
    routed = compose(model, library, Spectr(top_k=2))
    model.register_forward_pre_hook(lambda _, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True)
    find_experts(model, routed, tokenizer, [LONG, "who"], "bees")
    assert widths == [12]


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
    assert "- task 'moods', example 2: the choice ' \\t' has no tokens\n  expected: choices with at least one" in text
    assert "example 3: the choice 'red red red red red red red red red red '... has 21 tokens" in text
    assert "expected: choices that leave room for a prompt in the model's context of 20 tokens" in text
    with pytest.raises(DataError) as caught:
        encode_examples(tokenizer, examples[:2], None)
    assert_says(caught.value, given=("example 2: the choice",), expected="one token", do="correct the choices")


def bench(tmp_path, library, model=None, **tasks):
    return ExperimentSetup(
        model=model or make_model(), tokenizer=make_tokenizer(), library=library, tasks=tasks, folder=tmp_path
    )


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
    result = EXPERIMENTS.load("quality")(given)
    [ants, bees] = result.rows
    assert (ants[2], bees[2]) == ("100.0%", "")  # the majority class is for choices
    assert "bees is free text, measured by rougeL." in result.notes
    assert (
        "1 prompt of ants left no room for the answer in the model's context of 16 tokens and lost their beginning."
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
    methods = EXPERIMENTS.load("multitask")(given).data["methods"]
    assert methods["base"]["accuracy"]["bees"] == pytest.approx(result.data["base"][1])
    assert {"spectr, k 2", "calibrated, k 2"} <= set(methods)
