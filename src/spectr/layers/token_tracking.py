"""Follows a call's tokens through a model, so that a layer knows which row and position its inputs belong to.

The tokens of the call's arguments are marked. A dispatch mode sees every operation: those that move elements move the
marks likewise, and computations pass marks on along the axes that they keep. An operation that is not known here loses
the marks. Where hidden states are added to others (a residual connection), marks of both are compared, and what they
disagree on is lost. A mark that is there is right.

Legend: B rows, T tokens of a row. A mark is ``row * (T + 1) + position``; the position ``T`` is unknown, and -1 stands
for no token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from spectr.errors import CompositionError
from spectr.layers.batch_routing import thread

_LARGEST = 1 << 22  # marks that are compared one by one


class Marks(NamedTuple):
    """The marks of a tensor's elements.

    Attributes:
        at: Of size 1 along axes where all are alike, otherwise of the tensor's size.
        by_data: Whether values decided which elements there are, as where a router of MoE experts picks tokens.
    """

    at: Int[Tensor, "*A"]
    by_data: bool = False


class TokenTracker(TorchDispatchMode):
    """Follows the tokens of one call while it is entered.

    Args:
        rows: B.
        tokens: T.
        rules: What operations make of marks, by their names (:data:`spectr.layers.tracking_rules.RULES`).
        certain: Whether the rows of all inputs are known. If not, an input is not taken for another one of its shape.
        assumed: Whether rows of some inputs are assumed, which has to be seen where they meet the text's tokens.

    Attributes:
        met: Whether inputs met tokens of the rows that they were assumed to belong to.
    """

    supports_higher_order_operators = True

    def __init__(
        self, rows: int, tokens: int, rules: Mapping[str, TrackingRule], *, certain: bool = True, assumed: bool = False
    ):
        super().__init__()
        self.rows, self.tokens, self._rules = rows, tokens, rules
        self.certain, self.assumed, self.met = certain, assumed, False
        # by place in memory: every operation that writes a tensor there comes by here and replaces what is known
        self._known: dict[tuple[Any, ...], Marks] = {}
        self._alike: dict[tuple[int, ...], Marks | None] = {}  # by leading axes, of inputs that were asked for

    def mark_tokens(self, tensor: Tensor) -> None:
        """Mark a tensor (B, T, ...) by rows and positions."""
        at_BT = torch.arange(self.rows)[:, None] * (self.tokens + 1) + torch.arange(self.tokens)
        self._known[_key(tensor)] = Marks(at_BT.view(self.rows, self.tokens, *(1 for _ in tensor.shape[2:])))

    def mark_rows(self, tensor: Tensor, row_N: Int[Tensor, " N"] | None = None) -> None:
        """Mark a tensor (N, ...) by rows alone: row ``i`` at ``i``, or others."""
        row_N = torch.arange(self.rows) if row_N is None else row_N
        at_N = row_N * (self.tokens + 1) + self.tokens
        self._known[_key(tensor)] = Marks(at_N.view(-1, *(1 for _ in tensor.shape[1:])))

    def of(self, x: Tensor) -> Marks | None:
        """The marks of a layer's tokens, of the shape of its leading axes; ``None`` where they are not known.

        Where an operation lost them, those of all other inputs that had these axes.
        """
        found, leading = self._known.get(_key(x)), tuple(x.shape[:-1])
        at = None if found is None else self.alike_along(found.at, [-1])
        if found is None or at is None:
            return self._alike.get(leading) if self.certain else None
        marks = Marks(at.expand(*leading, 1)[..., 0], found.by_data)
        self.note(marks, leading)
        return marks

    def note(self, marks: Marks, leading: tuple[int, ...]) -> None:
        """Record what inputs with these axes are, as long as all of them are the same."""
        known = self._alike.setdefault(leading, None if marks.by_data else marks)
        if known is not None and (marks.by_data or not torch.equal(known.at, marks.at)):
            self._alike[leading] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See torch."""
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        rule = self._rules.get(name) or self._rules.get(name.removesuffix("_"))
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = self._rules["pointwise"]
        if rule is None:  # inference mode also dispatches operations that consist of others
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        outs = out if isinstance(out, (list, tuple)) else (out,)
        found = self._followed(rule, func, args, kwargs, outs) if rule is not None else None
        for place, tensor in enumerate(outs):
            if _is_tensor(tensor) and tensor.numel():
                marks = found[place] if found is not None and place < len(found) else None
                if marks is None:
                    self._known.pop(_key(tensor), None)
                else:
                    self._known[_key(tensor)] = marks
        return out

    def _followed(self, rule: TrackingRule, func: Any, args: Any, kwargs: Any, outs: Sequence[Any]) -> Any:
        given = [*args, *kwargs.values()]
        tensors = [value for value in given if _is_tensor(value)]
        tensors += [value for some in given if isinstance(some, (list, tuple)) for value in some if _is_tensor(value)]
        if not any(tensor.numel() and _key(tensor) in self._known for tensor in tensors):
            return None
        return rule(self, func, args, kwargs, outs)

    def known(self, value: Any) -> Marks | None:
        """The marks of an operation's argument."""
        return self._known.get(_key(value)) if _is_tensor(value) and value.numel() else None

    def rows_of(self, at: Tensor) -> Tensor:
        """The same marks without positions."""
        return torch.where(at < 0, at, at // (self.tokens + 1) * (self.tokens + 1) + self.tokens)

    def alike_along(self, at: Tensor, axes: Sequence[int]) -> Tensor | None:
        """What is the same along axes, which then have size 1: marks, or their rows; ``None`` where nothing is."""
        for axis in axes:
            if at.shape[axis] == 1:
                continue
            first = at.narrow(axis, 0, 1)
            if not bool((at == first).all()):
                at, first = self.rows_of(at), self.rows_of(first)
                if not bool((at == first).all()):
                    return None
            at = first
        return at

    def compare(self, one: Tensor, other: Tensor) -> None:
        """Compare the rows of marks, element by element, where tokens of the text meet something else.

        Raises:
            CompositionError: An input does not belong to the stated row.
        """
        if not self.assumed:
            return
        text_one, text_other = (at % (self.tokens + 1) < self.tokens for at in (one, other))
        meeting = (one >= 0) & (other >= 0) & (text_one != text_other)
        if bool((meeting & (self.rows_of(one) != self.rows_of(other))).any()):
            self._known.clear()
            check_rows_known()
        self.met = self.met or bool(meeting.any())

    def merged(self, one: Marks | None, other: Marks | None) -> Marks | None:
        """The marks of two tensors in an elementwise operation."""
        if one is None or other is None:
            return other if one is None else one
        by_data = one.by_data and other.by_data
        a, b = one.at, other.at
        if a.shape == b.shape and (a is b or torch.equal(a, b)):
            return Marks(a, by_data)
        a, b = torch.broadcast_tensors(a, b)
        if a.numel() > _LARGEST:
            return None
        self.compare(a, b)
        rows_a, rows_b = self.rows_of(a), self.rows_of(b)
        both = torch.where(a == rows_a, b, torch.where((b == rows_b) | (a == b), a, rows_a))
        both = torch.where(rows_a == rows_b, both, -1)
        return Marks(torch.where(a < 0, b, torch.where(b < 0, a, both)), by_data)


def check_rows_known() -> None:
    """Refuse a call where it is not known which rows images or sounds belong to, unless it is only watched.

    Raises:
        CompositionError: Rows of this thread's call have experts of their own.
    """
    if thread.routing is not None and thread.routing.differs:
        raise CompositionError(
            "rows of this batch have experts of their own, and it is not known which row each image (video, sound) is "
            "of",
            expected="in each row as many placeholder tokens as its images take, or one image for each row",
            do="run one prompt at a time",
        )


TrackingRule = Callable[
    [TokenTracker, Any, Sequence[Any], Mapping[str, Any], Sequence[Any]], "Sequence[Marks | None] | None"
]


def _is_tensor(value: Any) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter)  # others have no memory of their own to identify them by


def _key(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), *tensor.shape, *tensor.stride())
