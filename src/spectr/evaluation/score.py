"""Score tasks with one model, example by example, by metrics from 0 to 1; an interrupted run resumes."""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spectr.errors import DataError, MissingExtraError, did_you_mean
from spectr.evaluation.choices import choice_logprobs, encode_examples, predict, routed_logprobs
from spectr.folders import with_parents
from spectr.grouping import chunks
from spectr.hashing import json_sha256
from spectr.models import context_length, generate_answers
from spectr.prompts.decision import PromptDecision
from spectr.tasks import Example
from spectr.tasks.task import CHOICE_METRICS, TEXT_METRICS

Metric = Callable[[str, str], float]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def text_metric(name: str) -> Metric:
    """The metric of this name: a function of (answer, reference).

    ``exact_match`` is 1 if both are equal apart from case, punctuation, English articles and white space, as in SQuAD's
    evaluation. ``rouge1``, ``rouge2`` and ``rougeL`` are the F-measures of the package ``rouge-score`` with Porter's
    stemmer; they consider only the letters a to z and digits.

    Raises:
        DataError: There is no such metric for free text.
        MissingExtraError: It is a ROUGE metric, and the package is not installed.

    Source: Rajpurkar et al., 2016 (SQuAD); Lin, 2004 (ROUGE).
    """
    if name not in TEXT_METRICS:
        raise DataError(f"metric '{name}' does not measure free text", do=did_you_mean(name, TEXT_METRICS))
    return _exact_match if name == "exact_match" else _rouge(name)


def _exact_match(answer: str, reference: str) -> float:
    return float(_normalised(answer) == _normalised(reference))


def _normalised(text: str) -> str:
    lowered = text.lower()
    bare = re.sub(r"\b(a|an|the)\b", " ", lowered.translate(_PUNCTUATION))
    return " ".join((bare if bare.strip() else lowered).split())  # else "a" and "%" would both become empty


def _rouge(name: str) -> Metric:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError(f"the metric {name}", "evaluate") from error
    scorer = RougeScorer([name], use_stemmer=True)
    return lambda answer, reference: float(scorer.score(reference, answer)[name].fmeasure)


Progress = Callable[[int], None]
_CHUNK, _BATCH = 32, 16  # examples that are kept at once, and that are answered at once


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A mean with its standard error over examples, both from 0 to 1, and how many examples."""

    value: float
    error: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Measurement:
        """The mean of values that are drawn independently; the error divides by n - 1."""
        count = len(values)
        mean = sum(values) / count
        spread = sum((value - mean) ** 2 for value in values) / max(count - 1, 1)
        return Measurement(value=mean, error=sqrt(spread / count), count=count)


def score_examples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    metric: str = "accuracy",
    length_normalised: bool = False,
    max_new_tokens: int = 64,
    decision: PromptDecision | None = None,
    keep: Path | None = None,
    origin: dict[str, Any] | None = None,
    former: dict[str, Any] | None = None,
    name: str | None = None,
    progress: Progress = lambda _: None,
) -> list[dict[str, Any]]:
    """A record of each example, in the order given; :func:`score_of` is its score.

    For choices, a record holds log-likelihoods, the prediction and whether it is right. For free text it holds the
    greedy answer and its score. ``lost`` is the number of tokens at the beginning of a prompt that did not fit into the
    model's context.

    Args:
        model: Plain or composed.
        tokenizer: Its tokenizer.
        examples: With choices, or of free text.
        metric: ``accuracy`` for choices; for free text a metric of :func:`text_metric`.
        length_normalised: Mean instead of sum over a choice's tokens.
        max_new_tokens: Maximum length of a free-text answer.
        decision: For a model that decides on prompts, ``routed.prompt``; its experts are recorded too.
        keep: JSONL file to which records are written; records of an interrupted run are read from it.
        origin: What else determines the results (model, router, experts, data). The file of a run with another origin
            is overwritten.
        former: ``origin`` in the form of earlier versions, whose files can be continued.
        name: The task's name, for errors.
        progress: Called with the number of examples that were finished since the last call.

    Raises:
        DataError: Examples cannot be scored with this metric or this model (see :func:`encode_examples`); nothing was
            scored.
    """
    choose = metric in CHOICE_METRICS
    if choose != all(example.choices for example in examples):
        raise DataError(
            f"metric '{metric}' and {'examples without' if choose else 'examples with'} choices",
            expected="accuracy for choices, another metric for free text",
            do=f"use another metric: {', '.join(TEXT_METRICS if choose else CHOICE_METRICS)}",
        )
    room = 0 if choose else max_new_tokens
    lost = [e.lost for e in encode_examples(tokenizer, examples, context_length(model), max_new_tokens=room, name=name)]
    measure = None if choose else text_metric(metric)
    form = [] if choose else [metric, max_new_tokens]
    keys = [_key(examples, length_normalised, one, form) for one in ([origin, former] if former else [origin])]
    done = _kept(keep, keys) if keep else {}
    progress(len(done))
    order = sorted(set(range(len(examples))) - set(done), key=lambda i: (-len(examples[i].prompt), i))
    with _appending(keep, keys[0], origin, fresh=not done) as write:
        for chosen in chunks(order, _CHUNK):
            some = [examples[i] for i in chosen]
            if measure is None:
                made = _choice_records(model, tokenizer, some, length_normalised, decision)
            else:
                made = _answer_records(model, tokenizer, some, measure, max_new_tokens, decision)
            for number, record in zip(chosen, made, strict=True):
                done[number] = record | ({"lost": lost[number]} if lost[number] else {})
                write({"number": number, **done[number]})
            progress(len(chosen))
    return [done[i] for i in range(len(examples))]


def counting(progress: Callable[[str, int, int, str], None], phase: str, total: int) -> Progress:
    """A :data:`Progress` that reports (phase, done so far, total, no remark)."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(phase, done, total, "")

    return advance


def score_of(record: dict[str, Any]) -> float:
    """A record's score, from 0 to 1: of choices whether the prediction is right."""
    return float(record["score"] if "score" in record else record["right"])


def _choice_records(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    length_normalised: bool,
    decision: PromptDecision | None,
) -> Iterator[dict[str, Any]]:
    if decision is None:
        scores, parts = (
            choice_logprobs(model, tokenizer, examples, length_normalised=length_normalised),
            [{}] * len(examples),
        )
    else:
        scores, weights_NE = routed_logprobs(model, tokenizer, examples, decision, length_normalised=length_normalised)
        parts = _experts(decision, weights_NE)
    for example, score_C, prediction, part in zip(examples, scores, predict(scores), parts, strict=True):
        yield {
            "label": example.label,
            "prediction": prediction,
            "right": prediction == example.label,
            "logprobs": [round(value, 5) for value in score_C.tolist()],
            **part,
        }


def _answer_records(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    measure: Callable[[str, str], float],
    max_new_tokens: int,
    decision: PromptDecision | None,
) -> Iterator[dict[str, Any]]:
    """Greedy answers with their scores; a prompt that leaves no room for the answer loses its beginning."""
    context = context_length(model)
    limit = None if context is None else context - max_new_tokens
    for some in chunks(examples, _BATCH):
        answers = generate_answers(
            model,  # pyright: ignore[reportArgumentType]
            tokenizer,
            [example.prompt for example in some],
            max_new_tokens=max_new_tokens,
            limit=limit,
        )
        weights_BE = None if decision is None else decision.weights_BE
        parts = [{}] * len(some) if weights_BE is None else _experts(decision, weights_BE)
        for example, answer, part in zip(some, answers, parts, strict=True):
            score = round(measure(answer, example.answer), 5)
            yield {"answer": answer, "reference": example.answer, "score": score, **part}


def _experts(decision: Any, weights_BE: Tensor) -> list[dict[str, Any]]:
    """For each prompt the part of its record with the experts that it was decided for, and their weights."""
    rows, without = weights_BE.tolist(), (0, decision.use.excluded)
    return [
        {"experts": {e: round(w, 4) for e, w in zip(decision.experts, row, strict=True) if w not in without}}
        for row in rows
    ]


def _key(examples: Sequence[Example], length_normalised: bool, origin: dict[str, Any] | None, text: list[Any]) -> str:
    content = [[[e.prompt, list(e.choices), e.label] for e in examples], length_normalised, origin]
    content += [text, [e.answer for e in examples]] if text else []
    return json_sha256(content)


def _kept(path: Path, keys: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The whole records of a file with one of these keys; a last line that a kill cut short is left out."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        if json.loads(lines[0]).get("key") not in keys:
            return {}
    except json.JSONDecodeError:
        return {}
    done = {}
    for line in lines[1:-1]:  # what follows the last line feed is not whole
        record = json.loads(line)
        done[record.pop("number")] = record
    return done


@contextmanager
def _appending(
    path: Path | None, key: str, origin: dict[str, Any] | None, *, fresh: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Append records to a file, a line each; without records to continue, the file starts empty."""
    if path is None:
        yield lambda _: None
        return
    if fresh:
        with_parents(path).write_text(json.dumps({"key": key, "origin": origin}) + "\n", encoding="utf-8")
    else:  # a last line that was cut short is removed in place, so that a kill here loses nothing
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        yield write
