"""What a chat template writes around a user's words."""

from __future__ import annotations

from typing import NamedTuple


class Opening(NamedTuple):
    """What a chat template writes around a user's words, as token ids; empty without a template.

    Attributes:
        first: Before the first user turn, including the system turn; not counted.
        later: Between an assistant's answer and the next user turn.
        last: After the last user turn, before the answer; not counted.
    """

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    last: tuple[int, ...] = ()

    def last_turn(self, ids: list[int]) -> list[int]:
        """A conversation without the turns before the user's last; other prompts are unchanged."""
        size = len(self.later)
        last = len(ids) - size - 1  # at least one token must follow
        begins = (i for i in range(last, -1, -1) if size and tuple(ids[i : i + size]) == self.later)
        begin = next(begins, None)
        return ids if begin is None else [*self.first, *ids[begin + size :]]

    def length(self, ids: list[int]) -> int:
        """Number of tokens at the beginning that are not counted."""
        size = len(self.first)
        return size if len(ids) > size and tuple(ids[:size]) == self.first else 0

    def closing(self, ids: list[int]) -> int:
        """Number of tokens at the end that are not counted; at least one remains in between."""
        size = len(self.last)
        ends = bool(size) and len(ids) > self.length(ids) + size and tuple(ids[-size:]) == self.last
        return size if ends else 0

    def counted(self, ids: list[int], limit: int) -> tuple[list[int], int]:
        """The part of a prompt that is read for a decision, and how many tokens at its beginning are not counted.

        Args:
            ids: The prompt.
            limit: Maximum number of counted tokens.
        """
        turn = self.last_turn(ids)
        skipped = self.length(turn)
        return turn[: min(skipped + limit, len(turn) - self.closing(turn))], skipped

    def last_words(self, ids: list[int]) -> list[int]:
        """The user's last words, without the template."""
        turn = self.last_turn(ids)
        return turn[self.length(turn) : len(turn) - self.closing(turn)]

    def first_words(self, ids: list[int]) -> list[int]:
        """The user's first words, without the template."""
        said, size = ids[self.length(ids) :], len(self.last)
        ends = (i for i in range(1, len(said)) if size and tuple(said[i : i + size]) == self.last)
        return said[: next(ends, len(said))]
