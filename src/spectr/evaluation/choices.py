"""Examples as token ids, and multiple choice by the log-likelihood of the whole choice; shared tokens run once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spectr.errors import DataError, SpectrError, collecting, raise_together
from spectr.grouping import chunks, grouped
from spectr.layers.linear_layers import input_device
from spectr.models import (
    context_length,
    encode_answer,
    encode_prompt,
    pad_batch,
    pad_rows,
    reads_in_parts,
    shared_prefix,
)
from spectr.prompts.decision import PromptDecision, decides_by_prompt
from spectr.tasks import Example

_SHOWN = 5  # problems that an error lists in full


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """One example.

    Attributes:
        prompt: Its token ids, without those that do not fit.
        choices: Token ids of each choice, with the end-of-sequence token; empty for free text.
        lost: Number of tokens at the prompt's beginning that do not fit.
    """

    prompt: list[int]
    choices: list[list[int]]
    lost: int = 0


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    context: int | None,
    *,
    max_new_tokens: int = 0,
    name: str | None = None,
) -> list[Encoding]:
    """Token ids of examples. A prompt that leaves no room for the answer loses its beginning.

    Args:
        tokenizer: The model's.
        examples: With choices, or of free text.
        context: Maximum number of tokens of the model; ``None`` for any number.
        max_new_tokens: Room for a free-text answer; for choices it is the length of the longest.
        name: The task's name, for errors.

    Raises:
        DataError: Choices have no tokens, or choices or answers leave no room for a prompt; lists all of these.
    """
    place = f"task '{name}', example" if name else "example"
    encoded: list[Encoding] = []
    problems: list[SpectrError] = []
    for number, example in enumerate(examples, start=1):
        with collecting(problems, f"{place} {number}"):
            encoded.append(_encode(tokenizer, example, context, max_new_tokens))
    raise_together(f"task '{name}'" if name else "the examples", problems, DataError, most=_SHOWN)
    return encoded


def _encode(tokenizer: PreTrainedTokenizerBase, example: Example, context: int | None, max_new_tokens: int) -> Encoding:
    choices = [encode_answer(tokenizer, choice) for choice in example.choices]
    ends = 0 if tokenizer.eos_token_id is None else 1
    for choice, ids in zip(example.choices, choices, strict=True):
        if len(ids) == ends:
            raise DataError(
                f"the choice {choice!r} has no tokens",
                expected="choices with at least one token in this model's vocabulary",
                do="correct the choices of the task or of the row",
            )
        if context is not None and len(ids) >= context:
            raise DataError(
                f"the choice {_short(choice)} has {len(ids)} tokens",
                expected=f"choices that leave room for a prompt in the model's context of {context} tokens",
                do="shorten it, omit the row, or use a model with a longer context",
            )
    prompt = encode_prompt(tokenizer, example.prompt)
    if context is None:
        return Encoding(prompt=prompt, choices=choices)
    room = context - max(map(len, choices), default=max_new_tokens)
    kept = encode_prompt(tokenizer, example.prompt, limit=room)
    return Encoding(prompt=kept, choices=choices, lost=len(prompt) - len(kept))


def _short(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}..."


Progress = Callable[[int], None]
T = TypeVar("T")


@torch.inference_mode()
def choice_logprobs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    length_normalised: bool = False,
    batch_size: int = 16,
    progress: Progress = lambda _: None,
) -> list[Float[Tensor, " choices"]]:
    """Log-likelihood of every choice of every example.

    ``sum_i log p(choice_i | prompt, choice_<i)`` over the choice's tokens and the end-of-sequence token, optionally
    divided by their number. The longest prompts run first; tokens that all prompts begin with run once. A prompt that
    leaves no room for the longest choice in the model's context loses its beginning.

    Args:
        model: A language model of transformers, in evaluation mode; with an encoder too.
        tokenizer: Its tokenizer.
        examples: Examples with choices.
        length_normalised: Mean instead of sum.
        batch_size: Prompts per batch.
        progress: Called with the number of examples that were finished since the last call.

    Returns:
        For each example, one float32 tensor of shape (choices,), in nats, in the given order.

    Raises:
        DataError: The model decides on prompts (use :func:`routed_logprobs`), or a choice has no tokens or more than
            the context.
    """
    if decides_by_prompt(model):
        raise DataError(
            "this model decides for whole prompts, so that prompts cannot share their beginning",
            do="use routed_logprobs(model, tokenizer, examples, routed.prompt)",
        )
    encoded = encode_examples(tokenizer, examples, context_length(model))
    return _logprobs(model, tokenizer, encoded, length_normalised, batch_size, progress)


@torch.inference_mode()
def routed_logprobs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    decision: PromptDecision,
    *,
    length_normalised: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Log-likelihoods of a model that decides on prompts, and its weights, (examples, experts).

    All decisions come first. Then prompts with equal decisions are scored together, with one shared prefix.
    """
    encoded = encode_examples(tokenizer, examples, context_length(model))
    device = input_device(model)
    batches = [pad_batch(tokenizer, [one.prompt for one in some], device=device) for some in chunks(encoded, 16)]
    weights_NE = torch.cat([decision.decide(**batch) for batch in batches])
    scores = decided_alike(
        decision,
        weights_NE.tolist(),
        lambda members: _logprobs(model, tokenizer, [encoded[i] for i in members], length_normalised),
    )
    return scores, weights_NE


def decided_alike(
    decision: PromptDecision, rows: Sequence[Sequence[float]], score: Callable[[list[int]], Sequence[T]]
) -> list[T]:
    """Score examples with equal decisions together, while their decision holds.

    Args:
        decision: The model's.
        rows: For each example the decided weights.
        score: Maps indices of examples to their scores.
    """
    found: dict[int, T] = {}
    for row, members in grouped((tuple(row), number) for number, row in enumerate(rows)).items():
        with decision.using(torch.tensor([row], dtype=torch.float32)):
            found.update(zip(members, score(members), strict=True))
    return [found[i] for i in range(len(rows))]


def predict(logprobs: Sequence[Tensor]) -> list[int]:
    """The most likely choice of each example."""
    return [int(score_C.argmax()) for score_C in logprobs]


def accuracy(predictions: Sequence[int], examples: Sequence[Example]) -> float:
    """Share of examples whose prediction is the label, from 0 to 1."""
    return sum(p == e.label for p, e in zip(predictions, examples, strict=True)) / len(examples)


def _logprobs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoding],
    length_normalised: bool,
    batch_size: int = 16,
    progress: Progress = lambda _: None,
) -> list[Tensor]:
    prompts = [one.prompt for one in encoded]
    longest = max((len(one.prompt) + max(map(len, one.choices)) for one in encoded), default=0)
    in_parts = reads_in_parts(model, longest)
    prefix = shared_prefix(prompts) if in_parts and len(prompts) > 1 else []
    device = input_device(model)
    cache = _run(model, torch.tensor([prefix], device=device)).past_key_values if prefix else None
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = sorted(range(len(encoded)), key=lambda i: -len(prompts[i]))
    found: dict[int, Tensor] = {}
    for chosen in chunks(order, batch_size):
        own = [prompts[i][len(prefix) :] for i in chosen]
        choices = [encoded[i].choices for i in chosen]
        if in_parts:
            scores = _batch_logprobs(model, own, choices, len(prefix), copy.deepcopy(cache), pad)
        else:
            scores = _whole_logprobs(model, own, choices, pad)
        for i, score_C, ids in zip(chosen, scores, choices, strict=True):
            lengths_C = torch.tensor([len(choice) for choice in ids])
            found[i] = score_C / lengths_C if length_normalised else score_C
        progress(len(chosen))
    return [found[i] for i in range(len(encoded))]


def _whole_logprobs(
    model: nn.Module, prompts: list[list[int]], choices: list[list[list[int]]], pad: int
) -> list[Tensor]:
    """Log-likelihoods of each prompt's choices, with each prompt read again for each choice, and padding last."""
    known: Any = model
    rows = [(prompt, option) for prompt, options in zip(prompts, choices, strict=True) for option in options]
    two_sided = known.config.is_encoder_decoder
    first = 0 if two_sided else min(map(len, prompts)) - 1  # position of the first target of all
    before = [0 if two_sided else len(prompt) - 1 - first for prompt, _ in rows]
    labels = [[-100] * count + option for count, (_, option) in zip(before, rows, strict=True)]
    label_NT = pad_rows(labels, -100, left=False, device=input_device(model))
    read = [prompt if two_sided else prompt + option[:-1] for prompt, option in rows]
    given: dict[str, Any] = {
        "input_ids": pad_rows(read, pad, left=False, device=input_device(model)),
        "attention_mask": pad_rows([[1] * len(ids) for ids in read], 0, left=False, device=input_device(model)),
        "use_cache": False,
    }
    count = label_NT.shape[1]
    given |= (
        {"labels": label_NT}
        if two_sided
        else {"logits_to_keep": torch.arange(first, first + count, device=input_device(model))}
    )
    logits_NTV = model(**given).logits[:, -count:]  # a model that does not know logits_to_keep gives all
    score_NT = logits_NTV.float().log_softmax(-1).gather(2, label_NT.clamp(min=0)[..., None]).squeeze(2)
    return list((score_NT * (label_NT >= 0)).sum(-1).cpu().split([len(options) for options in choices]))


def _run(model: nn.Module, input_ids: Tensor, **more: Any) -> Any:
    return model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **more)


def _batch_logprobs(
    model: nn.Module,
    prompts: list[list[int]],
    choices: list[list[list[int]]],
    shared: int,
    cache: Any,
    pad: int,
) -> list[Tensor]:
    """Log-likelihoods of each prompt's choices, ``cache`` holding the ``shared`` tokens before every prompt."""
    device = input_device(model)
    ids_BT = pad_rows(prompts, pad, device=device)
    own_BT = pad_rows([[1] * len(prompt) for prompt in prompts], 0, device=device)
    mask_BT = nn.functional.pad(own_BT, (shared, 0), value=1)
    position_BT = mask_BT.cumsum(-1).sub(1).clamp(min=0)
    if cache is not None:
        cache.batch_repeat_interleave(len(prompts))
    out = _run(model, ids_BT, attention_mask=mask_BT, position_ids=position_BT[:, shared:], past_key_values=cache)
    first_BV = out.logits[:, -1].float().log_softmax(-1)

    counts = [len(options) for options in choices]
    flat = [option for options in choices for option in options]
    owner_N = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts)).to(device)
    choice_NT = pad_rows(flat, pad, left=False, device=device)
    real_NT = pad_rows([[1] * len(option) for option in flat], 0, left=False, device=device)
    score_N = first_BV[owner_N].gather(1, choice_NT[:, :1]).squeeze(1)
    later = choice_NT.shape[1] - 1
    if later:
        out.past_key_values.batch_select_indices(owner_N)
        mask_NT = torch.cat([mask_BT[owner_N], real_NT[:, :-1]], dim=1)
        position_NT = mask_NT.cumsum(-1).sub(1)[:, -later:]
        logits_NTV = model(
            input_ids=choice_NT[:, :-1],
            use_cache=True,
            attention_mask=mask_NT,
            position_ids=position_NT,
            past_key_values=out.past_key_values,
        ).logits
        later_NT = logits_NTV.float().log_softmax(-1).gather(2, choice_NT[:, 1:, None]).squeeze(2)
        score_N = score_N + (later_NT * real_NT[:, 1:]).sum(-1)
    return list(score_N.cpu().split(counts))
