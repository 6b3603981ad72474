"""Convert text to token ids, in the same way for training, evaluation and generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from spectr.errors import DataError


def context_length(model: Any) -> int | None:
    """Maximum number of tokens of a transformers model; ``None`` if its configuration does not state it."""
    return configured_context(model.config)


def configured_context(config: Any) -> int | None:
    """The :func:`context_length` of the models of a configuration."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = True, limit: int | None = None
) -> list[int]:
    """Token ids of a prompt, up to the start of the model's answer.

    Args:
        tokenizer: The base model's tokenizer.
        prompt: The user's text.
        chat: Wrap it in the tokenizer's chat template as one user turn, if there is a template.
        limit: Maximum number of tokens. A longer prompt loses its beginning: the start of the chat template stays, and
            the first of the user's own tokens are dropped.

    Raises:
        DataError: The prompt has no tokens, or the limit leaves no room for the user's own tokens.
    """
    ids = _encode(tokenizer, prompt, chat)
    if not ids:
        raise DataError(
            f"the prompt {prompt!r} has no tokens",
            expected="at least one token, as this tokenizer has no chat template and begins texts with no token",
            do="add text to the prompt, or omit it",
        )
    if limit is None or len(ids) <= limit:
        return ids
    opening = opening_length(tokenizer, chat=chat)
    if limit <= opening:
        raise DataError(
            f"there is room for {max(limit, 0)} tokens of a prompt, but the chat template's opening takes {opening}",
            do="shorten the answers (max_new_tokens, or the choices), or use a model with a longer context",
        )
    return ids[:opening] + ids[opening - limit :]


def opening_length(tokenizer: PreTrainedTokenizerBase, *, chat: bool = True) -> int:
    """Number of tokens that the chat template puts before every prompt; 0 without a template."""
    return len(shared_prefix([_encode(tokenizer, text, chat) for text in ("a", "1", "\u4e2d")]))


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    if not (chat and tokenizer.chat_template):
        return tokenizer(prompt)["input_ids"]  # pyright: ignore[reportReturnType]
    turn = [{"role": "user", "content": prompt}]
    text = templated(tokenizer, turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


def templated(tokenizer: Any, turns: Sequence[Mapping[str, str]], **options: Any) -> Any:
    """``tokenizer.apply_chat_template(turns, **options)``.

    Raises:
        DataError: The template is damaged, or refuses these turns.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(turns, **options)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise DataError(
            f"the model's chat template fails: {error}",
            expected="a template for turns of a user and an assistant",
            do="repair chat_template.jinja (or chat_template in tokenizer_config.json) in the model's folder",
        ) from error


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer that follows a prompt, with the end-of-sequence token."""
    text = answer if tokenizer.chat_template else " " + answer
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    end: Any = tokenizer.eos_token_id
    return ids if end is None else [*ids, end]


def shared_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """The longest common prefix that leaves at least one token of each sequence."""
    if not sequences:
        return []
    first, last = min(sequences), max(sequences)  # a prefix of these two is one of all between them
    room = min(map(len, sequences)) - 1
    same = (i for i in range(room) if first[i] != last[i])
    return list(first[: next(same, room)])
