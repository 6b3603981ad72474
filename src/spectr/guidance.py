"""Compare descriptions: instructions for prompts, descriptions of experts, and their similarity."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spectr.errors import CompositionError
from spectr.models.embed import Embedder, load_embedder
from spectr.models.samples import template_parts
from spectr.models.writer import LocalWriter, Writer
from spectr.prompts.chat_template import Opening
from spectr.routers.evidence.evidence import Similarity
from spectr.tasks import Example

_QUERY = (
    "Say in one short sentence what kind of task the following input is. Do not solve it.\n\n"
    "Input:\n{text}\n\nThe task:"
)
_TASK = (
    "Here are examples of one task.\n\n{examples}\n\nSay in one short sentence what the task is, so that other inputs "
    "of the same task are recognised. The task:"
)
_LONGEST = 1200  # characters of a prompt or an example that the writer reads


@dataclass(kw_only=True)
class Spent:
    """The cost of comparing descriptions so far.

    Attributes:
        prompts: Prompts that were compared.
        cached: Prompts among these whose vector was in the cache.
        tokens: Tokens that the writer wrote.
        writing: Seconds spent on writing.
        embedding: Seconds spent on embedding.
    """

    prompts: int = 0
    cached: int = 0
    tokens: int = 0
    writing: float = 0.0
    embedding: float = 0.0

    def __str__(self) -> str:
        new = self.prompts - self.cached
        return (
            f"{new} new of {self.prompts} prompts, {self.tokens} tokens written in {self.writing:.2f} s, "
            f"embedded in {self.embedding:.2f} s"
        )


class QueryGuide:
    """``cos(e_t, q)``: compare the experts' descriptions with an instruction that is written for the prompt.

    A conversation's vector is computed once and cached.

    Args:
        tokenizer: The base model's tokenizer, to decode the prompt.
        embed: Maps texts to unit vectors.
        write: Writes the instruction; ``None`` embeds the user's own words.
        per: ``"conversation"``: the first user turn represents all turns. ``"turn"``: each user turn is compared.

    Attributes:
        spent: The cost so far.

    Source: GLIDER (Li et al., 2024), section 3.
    """

    def __init__(
        self,
        tokenizer: Any,
        embed: Embedder,
        write: Writer | None = None,
        *,
        per: Literal["conversation", "turn"] = "conversation",
    ):
        self.tokenizer, self.embed, self.write, self.per = tokenizer, embed, write, per
        self.opening = Opening(*map(tuple, template_parts(tokenizer)))
        self.spent = Spent()
        self.instructions: dict[str, str] = {}
        self._vectors: dict[str, Tensor] = {}

    def __str__(self) -> str:
        return f"QueryGuide(write={self.write}, per={self.per})"

    @staticmethod
    def of(model: Any, tokenizer: Any, **options: Any) -> QueryGuide:
        """A guide where the base model writes and the default embedder embeds."""
        return QueryGuide(tokenizer, load_embedder(), LocalWriter(model, tokenizer), **options)

    def reader(self, descriptions: Mapping[str, str], experts: Sequence[str]) -> Similarity:
        """See :class:`spectr.composition.Guide`."""
        experts_ED = self.embed([descriptions[name] for name in experts])

        def read(input_ids: Tensor | None = None, *_: Any, **given: Any) -> Float[Tensor, "B E"]:
            if input_ids is None:
                raise CompositionError("a guide needs the prompt's token ids", do="call the model with input_ids")
            mask = given.get("attention_mask")
            real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
            rows = zip(input_ids, real.to(input_ids.device), strict=True)
            return self.queries([self._words(row[kept].tolist()) for row, kept in rows]) @ experts_ED.mT

        return read

    def between(self, descriptions: Mapping[str, str]) -> Float[Tensor, "E E"]:
        """See :class:`spectr.routers.evidence.ComparingGuide`."""
        vectors_ED = self.embed(list(descriptions.values()))
        return vectors_ED @ vectors_ED.mT

    def queries(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """The vectors of prompts; new prompts are written and embedded first."""
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        self.spent.prompts += len(texts)
        self.spent.cached += len(texts) - len(new)
        if new:
            began = time.monotonic()
            written = new
            if self.write is not None:
                before = self.write.written
                replies = self.write([_QUERY.format(text=_short(text)) for text in new])
                written = [_one_line(reply) or text for reply, text in zip(replies, new, strict=True)]
                self.spent.tokens += self.write.written - before
            self.spent.writing += time.monotonic() - began
            began = time.monotonic()
            self._vectors.update(zip(new, self.embed(written), strict=True))
            self.instructions.update(zip(new, written, strict=True))
            self.spent.embedding += time.monotonic() - began
        return torch.stack([self._vectors[text] for text in texts])

    def _words(self, ids: list[int]) -> str:
        of = self.opening.first_words if self.per == "conversation" else self.opening.last_words
        return str(self.tokenizer.decode(of(ids), skip_special_tokens=True)).strip()


def describe(write: Writer, examples: Sequence[Example]) -> str:
    """One sentence about what a few examples have in common, written by the language model.

    Args:
        write: A language model.
        examples: Examples of one expert's task; three to five are enough.
    """
    shown = [f"Input:\n{_short(example.prompt)}\nOutput: {_short(example.answer)}" for example in examples]
    [text] = write([_TASK.format(examples="\n\n".join(shown))])
    return _one_line(text)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _one_line(text: str) -> str:
    return " ".join(text.split())
