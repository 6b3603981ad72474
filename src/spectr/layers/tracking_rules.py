"""What operations make of the marks of tokens, for :class:`spectr.layers.token_tracking.TokenTracker`.

A rule is called as an operation of torch is, with the tracker before and the outputs after that, and gives the marks of
each output; none where they are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from spectr.layers.token_tracking import Marks, TokenTracker, TrackingRule


def _compact(at: Tensor) -> Tensor:
    """Size 1 along axes where marks are repeated; along the last one where they are found to be alike."""
    for axis, (size, stride) in enumerate(zip(at.shape, at.stride(), strict=True)):
        if size > 1 and stride == 0:
            at = at.narrow(axis, 0, 1)
    if at.ndim > 1 and at.shape[-1] > 1 and torch.equal(at[..., :1].expand_as(at), at):
        at = at[..., :1]
    return at


def _on_cpu(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_on_cpu(part) for part in value]
    return value.cpu() if isinstance(value, Tensor) else value


# Computations


def _pointwise(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    found: Marks | None = None
    for value in args:
        marks = tracker.known(value)
        if marks is not None:
            marks = Marks(marks.at[(None,) * (outs[0].ndim - marks.at.ndim)], marks.by_data)
            found = tracker.merged(found, marks)
    return [found] * len(outs)


def _same(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    return [tracker.known(args[0])]  # of the first output alone


def _product(first: int) -> TrackingRule:
    """Of matrices ``args[first] @ args[first + 1]``: rows of the left one have its marks."""

    def rule(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
        left, right = tracker.known(args[first]), tracker.known(args[first + 1])
        ndim = outs[0].ndim
        at = None if left is None or left.at.ndim < 2 else tracker.alike_along(left.at, [-1])
        of_right = None if right is None or right.at.ndim < 2 else tracker.alike_along(right.at, [-2])
        if at is None:
            return None if of_right is None or right is None else [Marks(_to_axes(of_right, ndim), right.by_data)]
        assert left is not None
        if of_right is not None:
            mine, theirs = (tracker.alike_along(tracker.rows_of(some), [-2, -1]) for some in (at, of_right))
            if mine is None or theirs is None or not bool((mine == theirs).all()):
                return None
        return [Marks(_to_axes(at, ndim), left.by_data)]

    return rule


def _to_axes(at: Tensor, ndim: int) -> Tensor:
    return at[(None,) * (ndim - at.ndim)] if ndim > at.ndim else at


def _attention(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    query = tracker.known(args[0])
    if query is not None:
        at = tracker.alike_along(query.at, [-1])
        return None if at is None else [Marks(at, query.by_data)]
    key = tracker.known(args[1])
    at = None if key is None else tracker.alike_along(tracker.rows_of(key.at), [-2, -1])
    return None if at is None or key is None else [Marks(at, key.by_data)]


def _embedding(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    marks = tracker.known(args[1])
    if marks is None:
        return None
    tracker.note(marks, tuple(args[1].shape))
    return [Marks(marks.at[..., None], marks.by_data)]


def _first_axis(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    """Of convolutions, pooling and patches: rows alone."""
    marks = tracker.known(args[0])
    if marks is None or len(args[0]) != len(outs[0]):
        return None
    at = tracker.alike_along(tracker.rows_of(marks.at), range(1, marks.at.ndim))
    return None if at is None else [Marks(at.view(-1, *(1 for _ in outs[0].shape[1:])), marks.by_data)]


def _halved(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    """Of ``glu``, which multiplies the halves of an axis."""
    marks, axis = tracker.known(args[0]), args[1] if len(args) > 1 else kwargs.get("dim", -1)
    at = None if marks is None else tracker.alike_along(marks.at, [axis % outs[0].ndim])
    return None if marks is None or at is None else [Marks(at, marks.by_data)]


def _reduced(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    """Of sums, means and the like over axes."""
    marks, ndim = tracker.known(args[0]), args[0].ndim
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    axes = given.get("dim", given.get("dims"))
    if marks is None or axes is None:
        return None
    axes = sorted({axis % ndim for axis in ([axes] if isinstance(axes, int) else axes)}, reverse=True)
    at = tracker.alike_along(marks.at, axes)
    if at is None:
        return None
    if outs[0].ndim < ndim:
        for axis in axes:
            at = at.squeeze(axis)
    return [Marks(at, marks.by_data)] * len(outs)


# Moves


def _moved(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    marks = tracker.known(args[0])
    if marks is None:
        return None
    moved = func(marks.at.expand(args[0].shape), *_on_cpu(args[1:]), **{key: _on_cpu(v) for key, v in kwargs.items()})
    moved = moved if isinstance(moved, (list, tuple)) else (moved,)
    return [Marks(_compact(at), marks.by_data) for at in moved]


def _reshaped(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    marks, shape = tracker.known(args[0]), outs[0].shape
    if marks is None or not isinstance(args[1], (list, tuple)):  # another dtype
        return None
    if marks.at.shape[-1:] == (1,) and args[0].shape[-1] == shape[-1]:
        at = marks.at.expand(*args[0].shape[:-1], 1).reshape(*shape[:-1], 1)
        return [Marks(_compact(at), marks.by_data)]
    return [Marks(_compact(marks.at.expand(args[0].shape).reshape(outs[0].shape)), marks.by_data)]


def _picked(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    """``x[i, j]``: of axes that are not indexed the marks may stay compact."""
    marks = tracker.known(args[0])
    if marks is None:
        return None
    indices = [None if index is None else index.cpu() for index in args[1]]
    axes = sum(1 if index is None or index.dtype is not torch.bool else index.ndim for index in indices)
    at = marks.at.expand(*args[0].shape[:axes], *marks.at.shape[axes:])
    by_data = marks.by_data or any(
        index is not None and (index.dtype is torch.bool or size > 1)
        for index, size in zip(indices, marks.at.shape, strict=False)
    )
    return [Marks(_compact(torch.ops.aten.index.Tensor(at, indices)), by_data)]


def _picked_along(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    marks = tracker.known(args[0])
    if marks is None:
        return None
    axis, index = args[1] % args[0].ndim, args[2].cpu()
    at = marks.at.expand(*(size if i == axis else marks.at.shape[i] for i, size in enumerate(args[0].shape)))
    return [Marks(at.index_select(axis, index), marks.by_data or marks.at.shape[axis] > 1)]


def _gathered(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    marks = tracker.known(args[0])
    if marks is None:
        return None
    return [Marks(_compact(marks.at.expand(args[0].shape).gather(args[1], args[2].cpu())), True)]


def _put(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    """``x[i, j] = values``."""
    return _written(
        tracker, args[0], args[2], lambda at, new: at.index_put([i if i is None else i.cpu() for i in args[1]], new)
    )


def _added(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    return _written(
        tracker, args[0], args[3], lambda at, new: at.index_copy(args[1], args[2].cpu(), new.expand(args[3].shape))
    )


def _written(tracker: TokenTracker, x: Tensor, values: Tensor, write: Callable[[Tensor, Tensor], Tensor]) -> Any:
    mine, theirs = tracker.known(x), tracker.known(values)
    if theirs is None:
        return [mine]
    at = torch.full((1,), -1) if mine is None else mine.at
    written = Marks(_compact(write(at.expand(x.shape), theirs.at)), True)
    return [tracker.merged(mine, written) if mine is not None else written]


def _scattered(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    """``x.masked_scatter(mask, source)``, as pictures take the place of the text's tokens."""
    mine, theirs = tracker.known(args[0]), tracker.known(args[2])
    if tracker.assumed and mine is not None and theirs is not None:
        shape, source = tuple(args[0].shape), args[2]
        whole = shape[-1] == source.shape[-1] and mine.at.shape[-1] == theirs.at.shape[-1] == 1
        mask = args[1].cpu().expand(shape)[..., :1] if whole else args[1].cpu().expand(shape)
        at = mine.at.expand(mask.shape)[mask]
        new = theirs.at.expand(*source.shape[:-1], 1) if whole else theirs.at.expand(source.shape)
        tracker.compare(at, new.flatten()[: len(at)])
    return [mine]


def _copied(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    marks = tracker.known(args[1])
    return None if marks is None else [Marks(_to_axes(marks.at, outs[0].ndim), marks.by_data)]


def _joined(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    """Of ``cat``: what is no token (such as a learned first one) has the row of what it is joined with."""
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % outs[0].ndim
    pieces = [(part, tracker.known(part)) for part in args[0] if part.numel()]
    first = pieces[0][1]
    if (
        first is not None
        and first.at.shape[axis] == 1
        and all(
            marks is not None and marks.at.shape == first.at.shape and torch.equal(marks.at, first.at)
            for _, marks in pieces
        )
    ):
        return [first]
    rows = [tracker.alike_along(tracker.rows_of(marks.at), [axis]) for _, marks in pieces if marks is not None]
    fill = rows[0] if rows[0] is not None else torch.full((1,) * outs[0].ndim, -1)
    parts = [(fill if marks is None else marks.at).expand(part.shape) for part, marks in pieces]
    by_data = any(marks is not None and marks.by_data for _, marks in pieces)
    joined = Marks(_compact(torch.cat(parts, axis)), by_data)
    if joined.at.shape[-1] == 1:  # hidden states
        leading = tuple(outs[0].shape[:-1])
        tracker.note(Marks(joined.at.expand(*leading, 1)[..., 0], by_data), leading)
    return [joined]


def _stacked(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % outs[0].ndim
    found = [tracker.known(part) for part in args[0]]
    if any(marks is None for marks in found):
        return None
    parts = [marks.at.expand(part.shape) for part, marks in zip(args[0], found, strict=True) if marks is not None]
    return [Marks(_compact(torch.stack(parts, axis)), any(marks.by_data for marks in found if marks is not None))]


def _padded(tracker: TokenTracker, func: Any, args: Any, kwargs: Any, outs: Any) -> Any:
    marks = tracker.known(args[0])
    if marks is None:
        return None
    at = torch.constant_pad_nd(marks.at.expand(args[0].shape), args[1], -1)
    axes = [args[0].ndim - 1 - i // 2 for i, size in enumerate(args[1]) if size]
    fill = tracker.alike_along(tracker.rows_of(marks.at), axes)
    return [Marks(_compact(at if fill is None else torch.where(at < 0, fill.expand_as(at), at)), marks.by_data)]


def _by_name(rules: Mapping[str, TrackingRule]) -> dict[str, TrackingRule]:
    return {name: rule for names, rule in rules.items() for name in names.split()}


RULES = _by_name(
    {
        "view _unsafe_view reshape _reshape_alias _reshape_copy": _reshaped,
        "permute transpose t expand slice select unsqueeze squeeze squeeze_copy flip roll unfold repeat split": _moved,
        "split_with_sizes unbind diagonal movedim narrow chunk tensor_split repeat_interleave unsafe_split": _moved,
        "unsafe_chunk flatten unflatten swapaxes mT": _moved,
        "detach alias clone _to_copy to contiguous lift_fresh native_layer_norm layer_norm _fused_rms_norm": _same,
        "rms_norm _softmax _safe_softmax softmax _log_softmax log_softmax native_dropout dropout": _same,
        "native_group_norm masked_fill cumsum cumprod tril triu": _same,
        "mm bmm _grouped_mm": _product(0),
        "addmm baddbmm": _product(1),
        "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention": _attention,
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math": _attention,
        "convolution conv1d conv2d conv3d max_pool2d_with_indices avg_pool1d avg_pool2d max_pool1d": _first_axis,
        "max_pool2d _adaptive_avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d native_batch_norm": _first_axis,
        "batch_norm upsample_bilinear2d upsample_bicubic2d upsample_nearest2d im2col": _first_axis,
        "glu": _halved,
        "sum mean amax amin var std logsumexp linalg_vector_norm norm max min prod": _reduced,
        "masked_scatter": _scattered,
        "copy": _copied,
        "embedding": _embedding,
        "index": _picked,
        "index_select": _picked_along,
        "gather": _gathered,
        "index_put": _put,
        "index_add": _added,
        "cat concat": _joined,
        "stack": _stacked,
        "constant_pad_nd": _padded,
        "pointwise": _pointwise,
    }
)
