"""From text to token ids, the same way in training, evaluation and generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = True) -> list[int]:
    """Token ids of a prompt, up to where the model's answer begins.

    Args:
        tokenizer: The base model's own.
        prompt: What the user says.
        chat: Wrap it in the tokenizer's chat template as one user turn, where there is a template.
    """
    if not (chat and tokenizer.chat_template):
        return tokenizer(prompt)["input_ids"]  # pyright: ignore[reportReturnType]
    turn = [{"role": "user", "content": prompt}]
    text: Any = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str, *, chat: bool = True) -> list[int]:
    """Token ids of an answer that follows a prompt, with the end-of-sequence token."""
    text = answer if chat and tokenizer.chat_template else " " + answer
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    end: Any = tokenizer.eos_token_id
    return ids if end is None else [*ids, end]


def shared_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The longest common prefix that leaves every sequence at least one token of its own."""
    if not sequences:
        return []
    first, last = min(sequences), max(sequences)  # what these two share, all that lie between them share
    room = min(map(len, sequences)) - 1
    same = (i for i in range(room) if first[i] != last[i])
    return list(first[: next(same, room)])
