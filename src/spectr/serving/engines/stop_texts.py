"""End an answer before the texts that a client gave as ``stop``, wherever their tokens begin and end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def stops_of(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts in a request's ``stop``."""
    given = body.get("stop") or ()
    return (given,) if isinstance(given, str) else tuple(given)


def before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of these texts."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


class StopCriterion:
    """Ends a generation of one row when its text contains one of some texts; see transformers' ``StoppingCriteria``.

    Transformers' own criterion fails on some tokenizers.

    Args:
        stops: The texts.
        tokenizer: The tokenizer of the package ``tokenizers``.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Any):
        from tokenizers.decoders import DecodeStream

        self._stops, self._tokenizer, self._tail = stops, tokenizer, ""
        self._decoding = DecodeStream([], skip_special_tokens=True)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Whether the row ends after its newest token."""
        self._tail += self._decoding.step(self._tokenizer, int(input_ids[0, -1])) or ""
        ends = any(stop in self._tail for stop in self._stops)
        self._tail = self._tail[-max(map(len, self._stops)) :]
        return torch.full((len(input_ids),), ends, dtype=torch.bool, device=input_ids.device)


class StopFilter:
    """Passes pieces of text on up to the first of some texts. What may be the beginning of one waits.

    Args:
        stops: The texts.
        hand_on: Receives the pieces, and everything that is no piece of text.
    """

    def __init__(self, stops: Sequence[str], hand_on: Callable[[Any], None]):
        self._stops, self._hand_on = stops, hand_on
        self._waiting, self._over = "", False

    def __call__(self, item: Any) -> None:
        """Take the next piece, or ``None`` for the end."""
        if type(item) is not str:  # the end, or what transformers' parser found
            self._pass_on(self._waiting)
            self._hand_on(item)
        elif not self._over:
            self._take(self._waiting + item)

    def _take(self, text: str) -> None:
        kept = before(text, self._stops)
        self._over = len(kept) < len(text)
        waiting = 0 if self._over else self._begun(text)
        self._pass_on(kept[: len(kept) - waiting])
        self._waiting = kept[len(kept) - waiting :]

    def _begun(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop."""
        longest = max(map(len, self._stops)) - 1
        ends = (size for size in range(min(longest, len(text)), 0, -1))
        return next((size for size in ends if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)

    def _pass_on(self, text: str) -> None:
        self._waiting = ""
        if text:
            self._hand_on(text)
