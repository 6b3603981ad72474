"""Texts for calibration: written by the model, or the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from spectr.layers.linear_layers import input_device
from spectr.models.generate import pad_rows
from spectr.models.text import context_length, encode_prompt, shared_prefix, templated

_ROWS = 32  # texts that are written at once
_MOST = 512  # maximum number of tokens of a text


class Texts(NamedTuple):
    """Texts as tokens: ids, counted tokens, tokens without padding; and the chat template around user turns."""

    input_ids: Int[Tensor, "N T"]
    counted: Bool[Tensor, "N T"]
    real: Bool[Tensor, "N T"]
    opening: list[int]
    turn: list[int]
    closing: list[int]


def self_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, samples: int, tokens: int, seed: int
) -> Texts:
    """Texts that the model writes as a user would: it continues the chat template from the start of a user's turn.

    Without a template it starts at the beginning of a text.

    Source: Xu et al., 2024 (Magpie), who draw instructions for training like this.
    """
    with _seeded(seed):
        rows = _written(model, tokenizer, samples, tokens)
    return encode_texts(model, tokenizer, [text for text in map(partial(_text, tokenizer), rows) if text] or ["?"])


def null_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, samples: int, tokens: int, seed: int
) -> Texts:
    """Ordinary prompts that the model writes, without garbled ones: those that it finds least likely.

    A tenth more texts are drawn, from the most likely tokens that make up 95 % (nucleus sampling). The texts with the
    lowest mean log-probability of a token are dropped.
    """
    drawn, found = samples + -(-samples // 10), list[tuple[float, str]]()
    with _seeded(seed):
        for _ in range(0, 2 * drawn, _ROWS):  # some texts may be empty
            seen = _LogProbabilities()
            rows = _written(model, tokenizer, min(_ROWS, drawn - len(found)), tokens, top_p=0.95, seen=seen)
            texts = map(partial(_text, tokenizer), rows)
            found += [(seen.mean(place, len(rows[place])), text) for place, text in enumerate(texts) if text]
            if len(found) == drawn:
                break
    least_likely = sorted(range(len(found)), key=lambda place: found[place][0])[: max(0, len(found) - samples)]
    kept = [text for place, (_, text) in enumerate(found) if place not in least_likely]
    return encode_texts(model, tokenizer, kept or ["?"])


class _LogProbabilities(LogitsProcessor):
    """Records how likely the model found each drawn token."""

    def __init__(self) -> None:
        self._next_BV: Tensor | None = None
        self._found: list[Float[Tensor, " B"]] = []

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """See transformers; the scores are unchanged."""
        if self._next_BV is not None:
            self._found.append(self._next_BV.gather(-1, input_ids[:, -1:])[:, 0])
        self._next_BV = scores.float().log_softmax(-1)
        return scores

    def mean(self, row: int, tokens: int) -> float:
        """The mean over the first tokens of a row; the very last token of all is not known."""
        found = [step_B[row].item() for step_B in self._found[:tokens]]
        return sum(found) / max(1, len(found))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        yield


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    first: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return template_parts(tokenizer)[0] or [first]


def _written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    tokens: int,
    *,
    top_p: float = 1.0,
    seen: LogitsProcessor | None = None,
) -> list[Int[Tensor, " T"]]:
    """Rows of sampled tokens, from the start of a user's words up to the model's end."""
    ids = torch.tensor([_start(tokenizer)] * samples, device=input_device(model))
    room = (context_length(model) or ids.shape[1] + tokens) - ids.shape[1]
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    written: Any = model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=top_p,
        repetition_penalty=1.0,
        max_new_tokens=min(tokens, room),
        min_new_tokens=1,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([] if seen is None else [seen]),
    )
    ends: Any = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends], device=written.device)
    rows = written[:, ids.shape[1] :]
    ended_NT = torch.isin(rows, ends).cumsum(1) > 0
    return [row[~ended] for row, ended in zip(rows, ended_NT, strict=True)]


def _text(tokenizer: PreTrainedTokenizerBase, row: Int[Tensor, " T"]) -> str:
    return str(tokenizer.decode(row, skip_special_tokens=True)).strip()


def encode_texts(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Texts:
    """A user's texts, each a prompt that is shortened if necessary; all tokens but the template's opening count."""
    opening, turn, closing = template_parts(tokenizer)
    most = min(len(opening) + _MOST, context_length(model) or len(opening) + _MOST)
    rows = [encode_prompt(tokenizer, text)[:most] for text in texts if text.strip()]
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, real = pad_rows(rows, pad, left=False), pad_rows([[1] * len(row) for row in rows], 0, left=False).bool()
    counted = real.clone()
    counted[:, : len(opening)] = False
    return Texts(ids, counted, real, opening, turn, closing)


def template_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """What the chat template writes before a first user turn, before a later one, and after the last.

    The second part is between an assistant's answer and the user's next words. The third ends where the answer starts.
    """
    if not tokenizer.chat_template:
        return [], [], []
    prompts = [encode_prompt(tokenizer, prompt) for prompt in ("a", "1", "\u4e2d")]
    turns = [("user", "first"), ("assistant", "second"), ("user", "third")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = str(templated(tokenizer, messages, tokenize=False))
    between = text.partition("second")[2].partition("third")[0]
    turn: Any = tokenizer(between, add_special_tokens=False)["input_ids"]
    return shared_prefix(prompts), turn, shared_prefix([ids[::-1] for ids in prompts])[::-1]
