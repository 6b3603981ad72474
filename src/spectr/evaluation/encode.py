"""Examples as token ids that fit into a model's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from spectr.errors import DataError, SpectrError, collecting, raise_together
from spectr.models import encode_answer, encode_prompt
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
