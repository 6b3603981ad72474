"""Texts to calibrate on: what a model writes from nothing, or a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectr.models.generate import pad_rows
from spectr.models.text import encode_prompt, shared_prefix


class Texts(NamedTuple):
    """Texts as tokens: ids, which count, which are no padding; and what the chat template puts around user turns."""

    input_ids: Int[Tensor, "N T"]
    counted: Bool[Tensor, "N T"]
    real: Bool[Tensor, "N T"]
    opening: list[int]
    turn: list[int]
    closing: list[int]


@torch.no_grad()
def self_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, samples: int, tokens: int, seed: int
) -> Texts:
    """What the model writes where a user would: the chat template up to a user's words, sampled on.

    Without a template it goes on from the beginning of a text.

    Source: Xu et al., 2024 (Magpie), who draw instructions for training so.
    """
    first: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = template_parts(tokenizer)[0] or [first]
    ids = torch.tensor([start] * samples, device=model.device)
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written: Any = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
            min_new_tokens=1,
            pad_token_id=pad,
        )
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in written[:, len(start) :]]
    return encode_texts(tokenizer, [text for text in texts if text] or ["?"])


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int = 512) -> Texts:
    """A user's texts, each a prompt cut after ``limit`` tokens; all but the template's opening counts."""
    opening, turn, closing = template_parts(tokenizer)
    rows = [encode_prompt(tokenizer, text)[: len(opening) + limit] for text in texts if text.strip()]
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, real = pad_rows(rows, pad, left=False), pad_rows([[1] * len(row) for row in rows], 0, left=False).bool()
    counted = real.clone()
    counted[:, : len(opening)] = False
    return Texts(ids, counted, real, opening, turn, closing)


def template_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """What the chat template writes before a first user turn, before a later one, and after the last.

    The second is between an assistant's answer and the user's next words. The third ends where the answer begins.
    """
    if not tokenizer.chat_template:
        return [], [], []
    prompts = [encode_prompt(tokenizer, prompt) for prompt in ("a", "1", "\u4e2d")]
    turns = [("user", "first"), ("assistant", "second"), ("user", "third")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    between = text.partition("second")[2].partition("third")[0]
    turn: Any = tokenizer(between, add_special_tokens=False)["input_ids"]
    return shared_prefix(prompts), turn, shared_prefix([ids[::-1] for ids in prompts])[::-1]
