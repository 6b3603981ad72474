"""From examples to batches: encoded once, in an order that only the seed determines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectr.errors import DataError, SpectrError, collecting, raise_together
from spectr.grouping import chunks
from spectr.models import context_length, encode_answer, encode_prompt, pad_rows, reads_in_parts, shared_prefix
from spectr.tasks import Example
from spectr.training.training_settings import OptimizerSettings

_BUCKET = 32  # batches that are sorted by length together
_LEAST = 2  # tokens of a prompt that remain
_SHOWN = 5  # problems that an error lists in full


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Training examples as token ids.

    Attributes:
        prefix: Tokens that all examples begin with; not repeated in ``prompts``.
        prompts: The rest of each prompt.
        answers: Each answer with its end-of-sequence token.
        shortened: Number of prompts that were longer than allowed.
        cut: Number of answers that were longer than allowed.
    """

    prefix: list[int]
    prompts: list[list[int]]
    answers: list[list[int]]
    shortened: int
    cut: int = 0

    def length(self, index: int) -> int:
        """Tokens of an example without the shared ones."""
        return len(self.prompts[index]) + len(self.answers[index])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's tokens, padded on the right: B examples, with T tokens each after S shared tokens.

    Padding comes last; elsewhere recurrent states and attention windows would count it. For a model with an encoder and
    a decoder, prompts are in ``input_ids`` and answers in ``labels``.

    Attributes:
        input_ids: (B, T) int64.
        attention_mask: (B, S + T) int64, 0 at padding.
        position_ids: (B, T) int64.
        labels: (B, A) int64, the targets of the last A positions; -100 where there is no target.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor


def longest(model: Any, settings: OptimizerSettings) -> int:
    """Maximum number of tokens of an example: the setting, or the model's context if that is shorter."""
    return min(settings.max_length, context_length(model) or settings.max_length)


def shares_prefix(model: PreTrainedModel) -> bool:
    """Whether the tokens that all prompts begin with can run once per batch.

    Transformers fills no cache where activations are checkpointed.
    """
    checkpointed = any(vars(module).get("gradient_checkpointing") for module in model.modules())
    return reads_in_parts(model) and not checkpointed


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, *, share: bool = True
) -> Encoded:
    """Token ids of all examples; a prompt that is too long loses its middle, and an answer its end.

    Args:
        tokenizer: The model's.
        examples: Prompts and answers.
        max_length: Maximum number of tokens of both.
        share: Separate the tokens that all prompts begin with, to run them once per batch.

    Raises:
        DataError: Prompts have no tokens; lists all of them.
    """
    prompts = _prompts(tokenizer, examples)
    whole = [encode_answer(tokenizer, example.answer) for example in examples]
    most = max(max_length - _LEAST, 1)
    answers = [answer[:most] for answer in whole]
    room = [max(max_length - len(answer), _LEAST) for answer in answers]
    shortened = sum(len(prompt) > size for prompt, size in zip(prompts, room, strict=True))
    prompts = [_without_middle(prompt, size) for prompt, size in zip(prompts, room, strict=True)]
    prefix = shared_prefix(prompts) if share else []
    own = [prompt[len(prefix) :] for prompt in prompts]
    cut = sum(len(answer) > most for answer in whole)
    return Encoded(prefix=prefix, prompts=own, answers=answers, shortened=shortened, cut=cut)


def _prompts(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[list[int]]:
    encoded: list[list[int]] = []
    problems: list[SpectrError] = []
    for number, example in enumerate(examples, start=1):
        with collecting(problems, f"example {number}"):
            encoded.append(encode_prompt(tokenizer, example.prompt))
    raise_together("the examples", problems, DataError, most=_SHOWN)
    return encoded


def batches(
    data: Encoded, *, batch_size: int, epochs: int, seed: int, pad: int, two_sided: bool = False
) -> Iterator[Batch]:
    """Every batch of the run, in an order that only the seed determines; examples of similar length are batched
    together.

    ``two_sided`` is for models with an encoder and a decoder, whose input is the prompts only.
    """
    collate = _collate_two_sided if two_sided else _collate
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(data.prompts), generator=generator).tolist()
        groups = [
            chunk
            for bucket in chunks(order, batch_size * _BUCKET)
            for chunk in chunks(sorted(bucket, key=data.length), batch_size)
        ]
        for index in torch.randperm(len(groups), generator=generator).tolist():
            yield collate(data, groups[index], pad)


def count_steps(data: Encoded, *, batch_size: int, epochs: int) -> int:
    """Optimiser steps of the run."""
    return epochs * -(-len(data.prompts) // batch_size)


def _collate(data: Encoded, chosen: Sequence[int], pad: int) -> Batch:
    rows = [data.prompts[i] + data.answers[i][:-1] for i in chosen]
    first = min(len(data.prompts[i]) for i in chosen) - 1  # position of the first target of all
    labels = [[-100] * (len(data.prompts[i]) - 1 - first) + data.answers[i] for i in chosen]
    return _batch(rows, labels, len(data.prefix), pad)


def _collate_two_sided(data: Encoded, chosen: Sequence[int], pad: int) -> Batch:
    return _batch([data.prompts[i] for i in chosen], [data.answers[i] for i in chosen], 0, pad)


def _batch(rows: list[list[int]], labels: list[list[int]], shared: int, pad: int) -> Batch:
    mask = pad_rows([[1] * (shared + len(row)) for row in rows], 0, left=False)
    return Batch(
        input_ids=pad_rows(rows, pad, left=False),
        attention_mask=mask,
        position_ids=mask.cumsum(-1).sub(1).clamp(min=0)[:, shared:],
        labels=pad_rows(labels, -100, left=False),
    )


def _without_middle(prompt: list[int], size: int) -> list[int]:
    return prompt if len(prompt) <= size else prompt[: size // 2] + prompt[len(prompt) - (size - size // 2) :]
