"""Generate answers: to prompts in one padded batch, and to a conversation as a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from spectr.layers.linear_layers import input_device
from spectr.models.cache import growing_cache
from spectr.models.text import encode_prompt, templated


def encode_batch(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    chat: bool = True,
    limit: int | None = None,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, both (batch, tokens), of :func:`encode_prompt`, padded on the left."""
    encoded = [encode_prompt(tokenizer, prompt, chat=chat, limit=limit) for prompt in prompts]
    return pad_batch(tokenizer, encoded, device=device)


def pad_batch(
    tokenizer: PreTrainedTokenizerBase, encoded: Sequence[list[int]], *, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, both (batch, tokens), padded on the left."""
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ones = [[1] * len(ids) for ids in encoded]
    return {"input_ids": pad_rows(encoded, pad, device=device), "attention_mask": pad_rows(ones, 0, device=device)}


def pad_rows(
    rows: Sequence[list[int]], value: int, *, left: bool = True, device: torch.device | None = None
) -> torch.Tensor:
    """Rows of numbers as one tensor, int64, (rows, length of the longest), padded with ``value``."""
    width = max(map(len, rows))
    fills = [[value] * (width - len(row)) for row in rows]
    pairs = zip(fills, rows, strict=True) if left else zip(rows, fills, strict=True)
    return torch.tensor([first + second for first, second in pairs], device=device)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = True,
    limit: int | None = None,
    **more: Any,
) -> list[str]:
    """Generate one answer for each prompt.

    Args:
        model: A causal language model, plain or composed.
        tokenizer: Its tokenizer.
        prompts: The user's texts.
        max_new_tokens: Maximum length of an answer.
        temperature: 0 always takes the most likely token; above 0, tokens are sampled.
        seed: Seed of the sampling.
        chat: Use the chat template, if there is one.
        limit: Maximum number of tokens of a prompt; see :func:`encode_prompt`.
        more: Further arguments of ``model.generate``.
    """
    batch = encode_batch(tokenizer, prompts, chat=chat, limit=limit, device=input_device(model))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        answers = _generate(model, tokenizer, batch, temperature, max_new_tokens=max_new_tokens, **more)
    return [answer.strip() for answer in answers]


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> str:
    """Generate the next answer of a conversation, print each word as soon as it is complete, and return the answer.

    Args:
        model: A causal language model, plain or composed.
        tokenizer: Its tokenizer, with a chat template.
        turns: The messages so far, each with "role" and "content".
        max_new_tokens: Maximum length of the answer.
        temperature: As for :func:`generate_answers`; samples with torch's global seed.
    """
    batch = templated(tokenizer, turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore
    batch = batch.to(input_device(model))
    [answer] = _generate(model, tokenizer, batch, temperature, max_new_tokens=max_new_tokens, streamer=streamer)
    return answer


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Mapping[str, torch.Tensor],
    temperature: float,
    **more: Any,
) -> list[str]:
    sampling: dict[str, Any] = {"do_sample": temperature > 0, "pad_token_id": tokenizer.pad_token_id}
    if temperature > 0:
        sampling["temperature"] = temperature
    more.setdefault("past_key_values", growing_cache(model))
    ids: Any = model.generate(**batch, **sampling, **more)  # pyright: ignore
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
