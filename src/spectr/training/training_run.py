"""One training run: evaluation before and after, the trained adapter, and the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectr.errors import DataError, some_of
from spectr.evaluation import accuracy, choice_logprobs, predict, text_metric
from spectr.evaluation.score import Measurement, counting, score_examples, score_of
from spectr.folders import check_new_folder
from spectr.hashing import json_sha256
from spectr.layers.model_state import restored
from spectr.tasks import Example
from spectr.training.adapter import Report, check_plain, publish, settle, untrained, with_adapter
from spectr.training.data import Encoded, count_steps, encode, longest, shares_prefix
from spectr.training.fit import Progress, fit, fresh_facts, read_facts, trainable
from spectr.training.training_settings import TrainingSettings

CHECKPOINT = "checkpoint.safetensors"
_OWN = (CHECKPOINT, "checkpoint.partial", ".partial")


def train_expert(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    base_model: str,
    train: Sequence[Example],
    test: Sequence[Example] = (),
    test_rows: Sequence[int] | None = None,
    validation: Sequence[Example] = (),
    settings: TrainingSettings,
    out: str | Path,
    data: dict[str, Any] | None = None,
    length_normalised: bool = False,
    metric: str = "accuracy",
    max_new_tokens: int = 64,
    note: str = "",
    checkpoint_seconds: float = 60.0,
    progress: Progress = lambda *_: None,
) -> Report:
    """Train a LoRA expert and write it to ``out`` as PEFT does, with a card. An interrupted run resumes.

    Args:
        model: The base model; unchanged afterwards.
        tokenizer: Its tokenizer.
        name: The expert's name.
        base_model: Name of the base model in the adapter's configuration.
        train: Training examples.
        test: Examples to measure on, before and after training.
        test_rows: Their numbers in the test data, for the card, if they are not all of it.
        validation: Examples with choices to measure accuracy on after every epoch. The best epoch's weights are kept,
            so that the test examples decide nothing.
        settings: See :class:`TrainingSettings`.
        out: Folder to write, which must not hold an expert yet.
        data: Origin of the examples (paths, hashes); for the card, and to identify this run.
        length_normalised: How choices are scored.
        metric: Metric of examples without choices; see :func:`spectr.evaluation.score.text_metric`.
        max_new_tokens: Maximum length of a measured answer.
        note: A remark for the card.
        checkpoint_seconds: Time between checkpoints.
        progress: Called with (phase, done, total, remark).

    Returns:
        The content of the card.

    Raises:
        DataError: ``out`` holds an expert, other files or another run's checkpoint; the model is composed or has an
            adapter; ``target_modules`` matches nothing that can be trained and read; there is nothing to train on; or
            the validation examples have no choices.
    """
    out = Path(out)
    check_folder(out)
    _check_examples(train, validation)
    check_plain(model)
    settings = settle(lambda: type(model)(deepcopy(model.config)), settings)
    train = train[: settings.examples]
    encoded = encode(tokenizer, train, longest(model, settings), share=shares_prefix(model))
    content = [asdict(settings), data, base_model, str(model.dtype), _tokens(encoded)]
    content += [_asked(validation), bool(validation) and length_normalised]
    fingerprint = json_sha256(content)
    meter = partial(_meter, model, tokenizer, progress, length_normalised, metric, max_new_tokens)
    measure, validate = meter(test) if test else None, meter(validation) if validation else None
    facts = read_facts(out / CHECKPOINT, fingerprint) or fresh_facts(fingerprint)
    how = [length_normalised] if not test or test[0].choices else [metric, max_new_tokens]
    tested = json_sha256([_asked(test), how])
    with restored(model):
        model.eval()
        if facts.get("tested") != tested:
            facts |= {"tested": tested, "before": measure("base model on the test data") if measure else None}
        peft_model = with_adapter(model, settings)
        total = count_steps(encoded, batch_size=settings.batch_size, epochs=settings.epochs)
        facts = fit(
            peft_model, encoded, settings, total, facts, out / CHECKPOINT, checkpoint_seconds, progress, validate
        )
        _round_to_bfloat16(trainable(peft_model))
        peft_model.eval()
        report = Report(
            name=name,
            base_model=base_model,
            settings=settings,
            metric="accuracy" if not test or test[0].choices else metric,
            data=data or {},
            train_examples=len(train),
            test_examples=len(test),
            validation_examples=len(validation),
            steps=facts["step"],
            shortened_prompts=encoded.shortened,
            shortened_answers=encoded.cut,
            last_loss=facts["loss"],
            validation_accuracy=facts["validation"],
            accuracy_before=facts["before"],
            accuracy_after=measure("expert on the test data") if measure else None,
            majority=_majority(test),
            seconds=round(facts["seconds"], 1),
            test_rows=None if test_rows is None else list(test_rows),
            without_gradient=untrained(peft_model),
        )
        publish(peft_model, out, report, note)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return report


def _check_examples(train: Sequence[Example], validation: Sequence[Example]) -> None:
    if not train:
        raise DataError("there are no training examples", do="check the data file and the limit on examples")
    if validation and not validation[0].choices:
        raise DataError("validation compares accuracies, but these examples have no choices", do="omit validation")


def checkpoint_step(out: str | Path) -> int:
    """The step from which the run in a folder would resume; 0 if nothing was saved."""
    facts = read_facts(Path(out) / CHECKPOINT)
    return facts["step"] if facts else 0


def check_folder(out: str | Path) -> None:
    """Raise :class:`DataError` unless an expert can be written to this folder without changing other files."""
    out = Path(out)
    if (out / "adapter_config.json").exists():
        raise DataError(f"{out} already holds an expert", do="choose another --out, or delete the folder")
    others = sorted(path.name for path in out.iterdir() if path.name not in _OWN) if out.is_dir() else []
    if others:
        raise DataError(
            f"{out} holds other files ({some_of(others, 4)})",
            expected="a new folder, or the folder of an interrupted run",
            do=f"choose another --out, such as {out / 'expert'}",
        )
    check_new_folder(out, DataError, inside=True)


@torch.no_grad()
def _round_to_bfloat16(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.copy_(parameter.to(torch.bfloat16))


def _meter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    length_normalised: bool,
    metric: str,
    max_new_tokens: int,
    examples: Sequence[Example],
) -> Callable[[str], float]:
    """Measures the model on examples when it is called: accuracy of choices, else the metric."""
    if not examples[0].choices:
        text_metric(metric)  # raises before anything is trained

    def measure(phase: str) -> float:
        advance = counting(progress, phase, len(examples))
        if examples[0].choices:
            scores = choice_logprobs(model, tokenizer, examples, length_normalised=length_normalised, progress=advance)
            return accuracy(predict(scores), examples)
        records = score_examples(
            model, tokenizer, examples, metric=metric, max_new_tokens=max_new_tokens, progress=advance
        )
        return Measurement.of([score_of(record) for record in records]).value

    return measure


def _majority(test: Sequence[Example]) -> float | None:
    if not test or not test[0].choices or len({example.choices for example in test}) > 1:
        return None
    return max(Counter(example.label for example in test).values()) / len(test)


def _asked(examples: Sequence[Example]) -> list[Any]:
    return [[example.prompt, example.answer, example.choices] for example in examples]


def _tokens(encoded: Encoded) -> list[Any]:
    return [encoded.prefix, encoded.prompts, encoded.answers]
