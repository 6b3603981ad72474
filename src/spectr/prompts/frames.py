"""Decisions that hold for several calls of a thread or task: a generation, or a block under a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor, nn

from spectr.errors import CompositionError
from spectr.prompts.arguments import expanded

if TYPE_CHECKING:
    from spectr.prompts.calls import Calls


class _Token:
    """Identifies a frame in records, which must not keep the frame alive."""


@dataclass(eq=False)
class Frame:
    """A generation or a block whose verdict holds for all of its calls.

    Attributes:
        verdict_BE: ``None`` if the router decides for each token.
        generates: Whether it is a generation.
        expand: Number of sequences per row (beams, returned sequences); ``None`` if unknown.
        assistants: The first verdict of each assisting composition.
        ended: Whether its calls are over.
        ids_BT: Token ids of a generation's whole input, if known.
        mask_BT: Of a generation's whole input, which of its tokens are real; ``None`` if unknown.
    """

    calls: Calls
    verdict_BE: Float[Tensor, "B E"] | None
    generates: bool = False
    expand: int | None = None
    assistants: dict[str, Tensor | None] = field(default_factory=dict)
    token: _Token = field(default_factory=_Token)
    requests: int = 0
    ended: bool = False
    ids_BT: Int[Tensor, "B T"] | None = None
    mask_BT: Int[Tensor, "B T"] | None = None

    def real(self, rows: int, tokens: int) -> Int[Tensor, "N T"] | None:
        """Which of the first tokens in a cache are real, where calls have masks of another form; ``None`` if unknown.

        Args:
            rows: Of the cache.
            tokens: In the cache. Those after the input were written by the model.
        """
        if self.mask_BT is None or self.expand is None:
            return None
        mask_BT = expanded(self.mask_BT[:, :tokens], rows, self.expand)
        return nn.functional.pad(mask_BT, (0, tokens - mask_BT.shape[1]), value=1)

    def next_row(self) -> Tensor | None:
        """The verdict's row for the next request that is added."""
        if self.verdict_BE is None:
            return None
        rows, number = len(self.verdict_BE), self.requests
        if rows > 1 and number >= rows:
            raise CompositionError(
                f"the verdict has {rows} rows, but a further request was added",
                do="decide on as many requests as are added in this block, or on one for all",
            )
        self.requests += 1
        return self.verdict_BE[:1] if rows == 1 else self.verdict_BE[number : number + 1]


_frames: ContextVar[tuple[Frame, ...]] = ContextVar(
    "spectr_frames", default=()
)  # frames of a thread or task, innermost last


def frame_of(calls: Calls) -> Frame | None:
    """The innermost frame of a composition."""
    return next((frame for frame in reversed(_open()) if frame.calls is calls), None)


def innermost() -> Frame | None:
    """The innermost frame of any composition."""
    return next(iter(_open()[-1:]), None)


def _open() -> tuple[Frame, ...]:
    """The frames here, without generations that ended: tasks that they started keep a copy of their context."""
    return tuple(frame for frame in _frames.get() if not (frame.generates and frame.ended))


@contextmanager
def framed(frame: Frame) -> Iterator[None]:
    """Use a frame while the block runs."""
    _frames.set((*_frames.get(), frame))
    try:
        yield
    finally:
        frame.ended = True
        _frames.set(tuple(other for other in _frames.get() if other is not frame))
