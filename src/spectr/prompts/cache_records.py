"""Records of the decisions for a cache's tokens. This is the only file that knows transformers' cache classes.

A record follows its cache: copied, reordered, repeated, selected and cropped rows keep their records. Transformers has
no place for a record, so a cache with a record gets a subclass of its class (``isinstance`` and the class name stay
the same), which is created on first use. States that are not a ``Cache`` (tuples, XLNet's ``mems``) are identified by
their first tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectr.errors import CompositionError

# Names of arguments and outputs with a model's state in transformers.
STATES = ("past_key_values", "cache_params", "mems", "past_buckets_states", "state", "rwkv_state", "past_key_value")
_MASKED = -1


@dataclass
class CacheRecord:
    """What a cache holds, and the decision under which it was computed.

    Attributes:
        composition: Identifies the experts and the router that wrote it.
        allowed: The experts that could be chosen.
        history: The verdict from each token on, (rows, experts); ``None`` if tokens decide.
        ids: Token ids as they were read, (rows, tokens) each, -1 if masked; ``None`` if unknown.
        positions: Their positions, if they were given.
        length: Number of tokens that were read.
        before: Number of other positions in the cache, which the model adds in front.
        frame: The generation or block that wrote it and defines its verdict.
        whole: Whether these tokens are all that was read; not with images, or masks or positions of other forms.
    """

    composition: str
    allowed: tuple[str, ...]
    history: tuple[tuple[int, Float[Tensor, "B E"] | None], ...] = ()
    ids: tuple[Int[Tensor, "B T"], ...] | None = ()
    positions: tuple[Int[Tensor, "B T"] | None, ...] = ()
    length: int = 0
    before: int = 0
    frame: object | None = field(default=None, compare=False)
    whole: bool = True

    @property
    def verdict_BE(self) -> Float[Tensor, "B E"] | None:
        """The verdict for the next token."""
        return self.history[-1][1] if self.history else None

    @property
    def ids_BT(self) -> Int[Tensor, "B T"] | None:
        """All token ids, -1 if masked."""
        return None if not self.ids else torch.cat(self.ids, dim=1)

    @property
    def positions_BT(self) -> Int[Tensor, "B T"] | None:
        """All positions; ``None`` if none was given, so that the model counts them."""
        if not self.ids or all(positions is None for positions in self.positions):
            return None
        parts, start = [], 0
        for ids_BT, positions in zip(self.ids, self.positions, strict=True):
            following = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
            parts.append(following.expand(ids_BT.shape) if positions is None else positions.expand(ids_BT.shape))
            start += ids_BT.shape[1]
        return torch.cat(parts, dim=1)

    def read(
        self,
        ids_BT: Tensor | None,
        mask_BT: Tensor | None,
        tokens: int,
        positions: Tensor | None = None,
        filled: int | None = None,
        *,
        whole: bool = True,
    ) -> None:
        """Record the tokens that follow.

        Args:
            ids_BT: Their ids, if known.
            mask_BT: Mask of these tokens, or of these and earlier ones.
            tokens: Their number.
            positions: Their positions, if given.
            filled: The cache's length now. A model may receive the whole text and add only what is new.
            whole: Whether nothing else was read with them.
        """
        self.whole = self.whole and whole
        if filled is not None and mask_BT is not None and mask_BT.ndim == 2 and mask_BT.shape[1] > max(filled, tokens):
            mask_BT = mask_BT[:, :filled]  # it has room for tokens to come, as static caches do
        if filled is not None and not self.length:
            self.before = max(0, filled - tokens)
        elif filled is not None and 0 < filled - self.before - self.length < tokens:
            tokens = filled - self.before - self.length
            ids_BT = None if ids_BT is None else ids_BT[:, -tokens:]
            positions = None if positions is None else positions[:, -tokens:]
        known = None if ids_BT is None or self.ids is None else (*self.ids, masked_ids(ids_BT, mask_BT))
        self.ids, self.length = known, self.length + tokens
        self.positions = (*self.positions, None if positions is None else positions.detach())

    def rows(self, index: Tensor) -> None:
        """Keep these rows, in this order."""

        def pick(rows: Tensor) -> Tensor:
            return rows[index.to(rows.device)]

        self.ids = None if self.ids is None else tuple(map(pick, self.ids))
        self.positions = tuple(p if p is None or len(p) == 1 else pick(p) for p in self.positions)
        self.history = tuple((start, None if verdict is None else pick(verdict)) for start, verdict in self.history)

    def have_rows(self, rows: int) -> None:
        """Compare with a cache's number of rows. Others may have dropped some, it is unknown which.

        Raises:
            CompositionError: There are more rows than before, or those before have different decisions.
        """
        verdict_BE = self.verdict_BE
        known = next((len(some) for some in (verdict_BE, *(self.ids or ())[:1]) if some is not None), rows)
        if known == rows:
            return
        if verdict_BE is not None and (rows > known or bool((verdict_BE != verdict_BE[:1]).any())):
            raise CompositionError(
                f"the cache continues with {rows} rows, but the decision has {known}",
                do="reorder, repeat or select its rows with the cache's own methods",
            )
        self.rows(torch.zeros(rows, dtype=torch.long))
        self.ids = None

    def repeat(self, times: int) -> None:
        """Repeat each row ``times`` times, adjacently."""
        first = next((verdict for _, verdict in self.history if verdict is not None), None)
        known = self.ids[0] if self.ids else first
        if known is not None:
            self.rows(torch.arange(len(known)).repeat_interleave(times))

    def crop(self, tokens: int) -> None:
        """Drop all but the first ``tokens``."""
        if tokens >= self.length:
            return
        ids, positions = self.ids_BT, self.positions_BT
        self.ids = None if self.ids is None else () if ids is None else (ids[:, :tokens],)
        self.positions = () if not self.ids else (None if positions is None else positions[:, :tokens],)
        self.history = tuple((start, verdict) for start, verdict in self.history if start == 0 or start < tokens)
        self.length = tokens
        if tokens == 0:
            self.ids, self.positions, self.whole = (), (), True

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheRecord:
        """A separate copy with the same frame."""
        return replace(self)


def masked_ids(ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Token ids with -1 where the mask (of these tokens, or of these and earlier ones) is zero."""
    if mask_BT is None or mask_BT.ndim != 2 or len(mask_BT) != len(ids_BT) or mask_BT.shape[1] < ids_BT.shape[1]:
        return ids_BT.detach()
    own_BT = mask_BT[:, mask_BT.shape[1] - ids_BT.shape[1] :].to(ids_BT.device)
    return ids_BT.detach().masked_fill(own_BT == 0, _MASKED)


class _Recorded:
    """Methods for a cache class that make its record follow it."""

    _record: CacheRecord

    def reset(self) -> None:
        super().reset()  # pyright: ignore[reportAttributeAccessIssue]
        self._record.crop(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportAttributeAccessIssue]
        self._record.rows(beam_idx)

    def crop(self, length: int) -> None:
        super().crop(length)  # pyright: ignore[reportAttributeAccessIssue]
        # negative: tokens to remove; positive: tokens to keep, as before transformers 5
        self._record.crop(max(0, self._record.length + length if length <= 0 else length - self._record.before))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # pyright: ignore[reportAttributeAccessIssue]
        self._record.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # pyright: ignore[reportAttributeAccessIssue]
        self._record.rows(torch.as_tensor(indices))

    @property
    def is_compileable(self) -> bool:
        # transformers compares the class itself, so as not to compile a DynamicCache
        from transformers import DynamicCache

        return type(self).__mro__[2] is not DynamicCache and super().is_compileable  # pyright: ignore[reportAttributeAccessIssue]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (type(self).__mro__[2],), vars(self)


@lru_cache(maxsize=256)
def _recorded_class(plain: type) -> type:
    named = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_Recorded, plain), named)


def _restored(plain: type) -> Any:
    return object.__new__(_recorded_class(plain))


_by_object: WeakKeyDictionary[Any, CacheRecord] = WeakKeyDictionary()
_by_tensor: list[WeakKeyDictionary[Any, CacheRecord]] = []


def _tensors() -> Any:
    """Records by tensor. Tensors compare by value, so this uses torch's dictionary."""
    if not _by_tensor:
        from torch.utils.weak import WeakTensorKeyDictionary

        _by_tensor.append(WeakTensorKeyDictionary())  # pyright: ignore[reportArgumentType]
    return _by_tensor[0]


def record_of(state: Any) -> CacheRecord | None:
    """The record of a cache or another state; ``None`` if it has none."""
    if isinstance(state, _Recorded):
        return state._record
    first = _first_tensor(state)
    if first is not None:
        return _tensors().get(first)
    try:
        return _by_object.get(state)
    except TypeError:
        return None


def attach(state: Any, record: CacheRecord) -> None:
    """Attach a record to a cache or another state."""
    if isinstance(state, _Recorded):
        state._record = record
        return
    first = _first_tensor(state)
    if first is not None:
        _tensors()[first] = record
    elif (hasattr(state, "reorder_cache") and hasattr(state, "layers")) or hasattr(state, "self_attention_cache"):
        state.__class__ = _recorded_class(type(state))
        state._record = record
    else:
        try:
            _by_object[state] = record
        except TypeError:  # cannot be identified later
            return


def is_filled(state: Any) -> bool:
    """Whether a state holds tokens."""
    if state is None:
        return False
    if _folds_apart(state):
        return bool(state.linear_cache)
    if hasattr(state, "get_seq_length"):
        length = length_of(state)
        if length is not None:
            return length > 0
        return bool(state.has_previous_state()) if hasattr(state, "has_previous_state") else True
    return not isinstance(state, (tuple, list)) or _first_tensor(state) is not None


def length_of(state: Any) -> int | None:
    """Number of tokens in a cache; ``None`` if it does not tell."""
    try:
        if _folds_apart(state):  # the first layer may be one of those that it folds
            return max((int(layer.get_seq_length()) for layer in state.layers), default=0) or None
        return int(state.get_seq_length())
    except (AttributeError, ValueError, TypeError):
        return None


def agrees(state: Any, record: CacheRecord) -> bool:
    """Whether a cache matches its record, as far as visible; others may have filled it since."""
    length = length_of(state)
    return length is None or length == record.before + record.length


def is_recurrent(state: Any) -> bool:
    """Whether a state mixes its tokens, so that none can be separated or removed."""
    if state is not None and not hasattr(state, "get_seq_length"):
        return True
    layers = getattr(state, "layers", None) or ()
    return _folds_apart(state) or any(
        hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states") for layer in layers
    )


def can_reset(state: Any) -> bool:
    """Whether a cache can be emptied in place."""
    return hasattr(state, "reset") and not _folds_apart(state)  # whose reset leaves them filled


def _folds_apart(state: Any) -> bool:
    """Whether a cache keeps the states of linear layers apart from its layers, as MiniMax's does."""
    return hasattr(state, "linear_cache")


def states_in(values: Any) -> Iterator[tuple[str, Any]]:
    """A model's states among its arguments by name, or in its output."""
    if isinstance(values, Mapping):
        for name in STATES:
            if values.get(name) is not None:
                yield name, values[name]
    elif isinstance(values, tuple):
        for value in values:
            if hasattr(value, "get_seq_length"):
                yield "past_key_values", value


def _first_tensor(state: Any) -> Tensor | None:
    while isinstance(state, (tuple, list)) and state:
        found: Sequence[Any] = [part for part in state if part is not None]
        if not found:
            return None
        state = found[0]
    return state if isinstance(state, Tensor) else None
