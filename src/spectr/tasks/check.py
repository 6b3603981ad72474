"""All contradictions between a task's fields, found at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spectr.errors import did_you_mean
from spectr.tasks import template

CHOICE_METRICS = ("accuracy",)
TEXT_METRICS = ("exact_match", "rouge1", "rouge2", "rougeL")
METRICS = (*CHOICE_METRICS, *TEXT_METRICS)


def faults(fields: Mapping[str, Any]) -> list[str]:
    """What is wrong between fields. Missing fields and fields of the wrong type are skipped."""
    return [*_of_templates(fields), *_of_answers(fields), *_of_letters(fields)]


def _of_templates(fields: Mapping[str, Any]) -> Iterator[str]:
    more = fields.get("paraphrases")
    listed = [fields.get("prompt"), fields.get("answer"), fields.get("letters")]
    for text in (*listed, *(more if isinstance(more, (list, tuple)) else ())):
        wrong = template.fault(text) if isinstance(text, str) else None
        if wrong:
            yield wrong


def _of_answers(fields: Mapping[str, Any]) -> Iterator[str]:
    choices, answer, metric = fields.get("choices"), fields.get("answer"), fields.get("metric")
    if isinstance(metric, str) and metric not in METRICS:
        yield f"unknown metric '{metric}'; {did_you_mean(metric, METRICS)}"
    if (choices is None) == (answer is None):
        yield "a task needs either 'choices' or a free-text 'answer' template"
    elif answer is None and metric in TEXT_METRICS:
        yield f"metric '{metric}' is for free text, but this task has choices: use {', '.join(CHOICE_METRICS)}"
    elif choices is None and metric in CHOICE_METRICS:
        yield f"metric '{metric}' is for choices, but this task's answer is free text: use {', '.join(TEXT_METRICS)}"
    if isinstance(choices, (list, tuple)) and all(isinstance(choice, str) for choice in choices):
        if len(choices) < 2 or len(set(choices)) < len(choices):
            yield "'choices' needs at least two different answers"
        if not all(choice.strip() for choice in choices):
            yield "'choices' holds an empty answer"


def _of_letters(fields: Mapping[str, Any]) -> Iterator[str]:
    letters = fields.get("letters")
    if letters is None and fields.get("form") == "letters":
        yield "'form' is letters, but there is no template 'letters'"
    if not isinstance(letters, str):
        return
    if fields.get("choices") is None:
        yield "'letters' lists choices, but this task has none"
    if template.fault(letters) is None and "options" not in template.names(letters):
        yield "'letters' needs {options}, which the lettered choices replace"
