"""Where a batch's tokens are among a layer's inputs: learned once for a layer, or followed in a call.

Most layers are given (rows, tokens, features). Some are given tokens first, or all tokens in one axis, or windows of
images; MoE experts the tokens that a router picks. No list of models: a few tokens are followed through the model
(:mod:`spectr.layers.token_tracking`), and a layer's input shows how its axes consist of rows and tokens.

Legend: B rows, T tokens of a row. Marks are those of :class:`TokenTracker`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spectr.layers.eval_mode import eval_mode
from spectr.layers.pairs import LayerInput, Pairs
from spectr.layers.token_tracking import Marks, TokenTracker, check_rows_known
from spectr.layers.tracking_rules import RULES
from spectr.layers.weight_reads import uncompiled

_ROWS, _TOKENS = 2, 5  # of the batch that layouts are learned by


class Layout(NamedTuple):
    """How the leading axes of a layer's input are composed of rows and tokens, for any number of them.

    Attributes:
        tokens_first: The order is token by token, as (tokens, rows, ...) or in one axis; otherwise row by row, as
            (rows, tokens, ...), in one axis, or in windows.
        positions: If a row has ``n`` times as many inputs as tokens: ``n`` for each token (``"outer"``), or ``n`` times
            all tokens (``"inner"``); ``None`` if places do not determine them.
    """

    tokens_first: bool = False
    positions: str | None = "outer"

    def marks(self, leading: tuple[int, ...], rows: int, tokens: int) -> Int[Tensor, "*L"] | None:
        """The marks of an input with these leading axes; ``None`` where it is not made so."""
        return _marks(self, leading, rows, tokens)

    def spread(self, rows_BN: Tensor, leading: tuple[int, ...]) -> Tensor | None:
        """Rows' numbers so that they broadcast over an input's leading axes; ``None`` where it is not made so."""
        rows = len(rows_BN)
        if self.tokens_first and leading[1:2] == (rows,):
            return rows_BN.view(1, rows, *(1 for _ in leading[2:]), -1)
        if not self.tokens_first and leading[0] == rows:
            return rows_BN.view(rows, *(1 for _ in leading[1:]), -1)
        if leading[0] % rows:
            return None
        if self.tokens_first:
            wide_BN = rows_BN.repeat(leading[0] // rows, 1)
        else:
            wide_BN = rows_BN.repeat_interleave(leading[0] // rows, 0)
        return wide_BN.view(leading[0], *(1 for _ in leading[1:]), -1)


@lru_cache(maxsize=64)
def _marks(layout: Layout, leading: tuple[int, ...], rows: int, tokens: int) -> Int[Tensor, "*L"] | None:
    count, second_is_rows = prod(leading), len(leading) > 1 and leading[1] == rows
    first = next(iter(leading))
    if count % rows or not (first % rows == 0 or (layout.tokens_first and second_is_rows)):
        return None
    index_N, each = torch.arange(count), count // rows
    if layout.tokens_first:
        inner = prod(leading[2:]) if second_is_rows else 1
        row_N, place_N = index_N // inner % rows, index_N // (inner * rows) * inner + index_N % inner
    else:
        row_N, place_N = index_N // each, index_N % each
    position_N = torch.full_like(index_N, tokens)
    if layout.positions is not None and each % tokens == 0:
        position_N = place_N // (each // tokens) if layout.positions == "outer" else place_N % tokens
    return (row_N * (tokens + 1) + position_N).view(leading)


ROWS_FIRST = tuple(Layout(False, positions) for positions in ("outer", "inner", None))
_CANDIDATES = tuple(Layout(first, positions) for positions in ("outer", "inner", None) for first in (False, True))


def _learned(found: Marks | None, leading: tuple[int, ...], rows: int, tokens: int) -> Layout | None:
    """The layout that explains an input's marks; ``None`` where it has to be followed in each call."""
    if found is None:
        return _by_shape(leading, rows, tokens)
    if found.by_data or bool((found.at < 0).any()):
        return None
    row_L, position_L = found.at // (tokens + 1), found.at % (tokens + 1)
    for layout in _CANDIDATES:
        marks = layout.marks(leading, rows, tokens)
        if marks is None or not torch.equal(marks // (tokens + 1), row_L):
            continue
        mine_L = marks % (tokens + 1)
        known_L = (position_L < tokens) & (mine_L < tokens)
        if bool((mine_L == position_L)[known_L].all()) and (layout.positions is None or bool((mine_L < tokens).all())):
            return layout
    return None


def _by_shape(leading: tuple[int, ...], rows: int, tokens: int) -> Layout | None:
    """The layout, from the sizes of axes only, where an operation lost the marks."""
    if leading == (rows,):
        return Layout(positions=None)
    if rows == tokens or leading[:2] not in ((rows, tokens), (tokens, rows)):
        return None
    return Layout(tokens_first=leading[:2] == (tokens, rows))


class Layouts:
    """The layouts of some modules, as far as they are known.

    Args:
        modules: Of one model.

    Attributes:
        known: The layouts; ``None`` where calls have to be followed.
        of_text: Those that a text alone shows, whatever else a call is given.
        repeated: Modules that one call of the model calls several times.
        paired: Modules that are given pairs of tokens and MoE experts.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self.modules = tuple(modules)
        self.known: dict[nn.Module, Layout | None] = {}
        self.of_text: dict[nn.Module, Layout | None] = {}
        self.repeated: set[nn.Module] = set()
        self.paired: set[nn.Module] = set()

    def are_fixed(self, *, positions: bool) -> bool:
        """Whether no call has to be followed, as every module's layout is known, and tells positions too."""
        found = (self.known.get(module) for module in self.modules)
        return all(layout is not None and not (positions and layout.positions is None) for layout in found)

    def learn(self, model: nn.Module, run: Callable[..., Any], given: Mapping[str, Any]) -> None:
        """Have the model read a few tokens in eval mode, and learn the layouts of the modules that get them.

        Args:
            model: The module that is called.
            run: Calls the model; its own methods, no entry of ours.
            given: Arguments of text alone, (2, 5), by their names.
        """
        if all(module in self.known for module in self.modules):
            return
        tracker, before = TokenTracker(_ROWS, _TOKENS, RULES), set(self.known)
        for value in given.values():
            if isinstance(value, Tensor):
                tracker.mark_tokens(value)
        devices = {
            value.device for value in given.values() if isinstance(value, Tensor) and value.device.type == "cuda"
        }
        with torch.no_grad(), torch.random.fork_rng(list(devices)), eval_mode(model), self.following(tracker):
            run(**given)
        self.of_text.update((module, layout) for module, layout in self.known.items() if module not in before)
        for module in self.modules:
            self.known.setdefault(module, None)

    @contextmanager
    def following(self, tracker: TokenTracker) -> Iterator[None]:
        """Follow the tokens of this thread's calls in the block, and learn the layouts that they show."""
        seen: dict[nn.Module, list[Layout | None]] = {}
        me, rows, tokens = threading.get_ident(), tracker.rows, tracker.tokens

        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() == me:
                x = next(value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, Pairs)))
                if isinstance(x, Pairs):
                    self.paired.add(module)
                    x = x.tokens_NH
                x = x if x.is_floating_point() else x[..., None]
                found = _learned(tracker.of(x), tuple(x.shape[:-1]), rows, tokens)
                seen.setdefault(module, []).append(found)

        unknown = [module for module in self.modules if self.known.get(module) is None]
        handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in unknown]
        try:
            with tracking(tracker):
                yield
        finally:
            for handle in handles:
                handle.remove()
        for module, found in seen.items():
            if tracker.certain and rows > 1 and tokens > 1 and len(set(found)) == 1:
                self.known[module] = found[0]
            if len(found) > 1:
                self.repeated.add(module)
        if tracker.assumed and not tracker.met:
            check_rows_known()


@contextmanager
def tracking(tracker: TokenTracker | None) -> Iterator[None]:
    """Follow the tokens of what this thread computes in the block, if there is a tracker."""
    if tracker is None:
        yield
        return
    with uncompiled(), tracker:
        yield


def few_tokens(tokens: Tensor) -> Tensor:
    """Two rows of five tokens out of a batch of ids or embeddings, to learn layouts by."""
    row = tokens[:1].repeat(_ROWS, -(-_TOKENS // tokens.shape[1]), *(1 for _ in tokens.shape[2:]))
    return row[:, :_TOKENS].clone()


class TokenPlaces(NamedTuple):
    """Where the tokens of one call are.

    Attributes:
        layouts: Of the model's layers.
        rows: B.
        tokens: T.
        tracker: Follows the call, where layouts are not enough.
        paired: See :class:`Layouts`.
    """

    layouts: Mapping[nn.Module, Layout | None]
    rows: int
    tokens: int
    tracker: TokenTracker | None = None
    paired: Collection[nn.Module] = ()

    def marks(self, layer: nn.Module, x: Tensor) -> Int[Tensor, "*L"] | None:
        """The marks of a layer's input; ``None`` where they are not known."""
        leading, layout = tuple(x.shape[:-1]), self.layouts.get(layer)
        if self.is_followed(layer) and self.tracker is not None:
            found = self.tracker.of(x)
            if found is not None:
                return found.at
        if layout is None and (self.tracker is None or self.tracker.certain):
            layout = _by_shape(leading, self.rows, self.tokens)
        return None if layout is None else layout.marks(leading, self.rows, self.tokens)

    def spread(self, rows_BN: Tensor, layer: nn.Module, x: Tensor) -> Tensor | None:
        """Rows' numbers so that they broadcast over the leading axes of a layer's input; ``None`` where unknown."""
        leading, layout = tuple(x.shape[:-1]), self.layouts.get(layer)
        if layout is not None:
            return layout.spread(rows_BN, leading)
        marks = self.marks(layer, x)
        if marks is None or bool((marks < 0).any()):
            return None
        return rows_BN[(marks // (self.tokens + 1)).to(rows_BN.device)]

    def is_followed(self, layer: nn.Module) -> bool:
        """Whether the layer's tokens are known by following the call alone."""
        layout = self.layouts.get(layer)
        return self.tracker is not None and (layout is None or layout.positions is None)

    def positions(self, layer: nn.Module, x: Tensor) -> Int[Tensor, "*L"] | None:
        """The positions of a layer's inputs; ``None`` where some are not known."""
        found = self.places(layer, x)
        return None if found is None else found[1]

    def places(self, layer: nn.Module, x: Tensor) -> tuple[Int[Tensor, "*L"], Int[Tensor, "*L"]] | None:
        """Rows and positions of a layer's inputs; ``None`` where some are not known."""
        marks = self.marks(layer, x)
        if marks is None or bool((marks < 0).any()):
            return None
        row_L, position_L = marks // (self.tokens + 1), marks % (self.tokens + 1)
        return None if bool((position_L == self.tokens).any()) else (row_L, position_L)

    def counted(
        self, layer: nn.Module, x: LayerInput, counted_BT: Bool[Tensor, "B T"] | None
    ) -> tuple[LayerInput, Int[Tensor, " N"]] | None:
        """A layer's input at the tokens that count, and each one's row; ``None`` where its tokens are not known.

        Args:
            layer: One of the layers.
            x: What it is given.
            counted_BT: The tokens that count, on the CPU; all of the input, if left out.
        """
        hidden = x.tokens_NH if isinstance(x, Pairs) else x
        marks = self.marks(layer, hidden)
        if marks is None:
            return None
        marks_N = marks.flatten()
        row_N, position_N = marks_N // (self.tokens + 1), marks_N % (self.tokens + 1)
        counts_N = marks_N >= 0
        if counted_BT is not None:
            counts_N = counts_N & (position_N < self.tokens)
            if not bool(counts_N.any()):
                return None
            counts_N &= counted_BT[row_N.clamp(min=0), position_N.clamp(max=self.tokens - 1)]
        index_N = counts_N.nonzero()[:, 0]
        if isinstance(x, Pairs):
            pairs = x.some(counts_N.to(hidden.device))
            return pairs, row_N[index_N][pairs.token_S.cpu()]
        return x.flatten(0, -2)[index_N.to(x.device)], row_N[index_N]

    def by_rows(self, values: Float[Tensor, "*L E"], layer: nn.Module, x: Tensor, missing: float) -> Tensor | None:
        """Values of a layer's inputs as (rows, tokens, E); ``missing`` for tokens that it is not given."""
        marks = self.marks(layer, x)
        if marks is None or bool((marks < 0).any()):
            return None
        marks_N, values_NE = marks.flatten(), values.flatten(0, -2)
        counts_B = (marks_N // (self.tokens + 1)).bincount(minlength=self.rows)
        if bool((counts_B == counts_B[0]).all()):
            order_N = marks_N.argsort(stable=True).to(values.device)
            return values_NE[order_N].view(self.rows, len(order_N) // self.rows, values.shape[-1])
        row_N, position_N = marks_N // (self.tokens + 1), marks_N % (self.tokens + 1)
        if bool((position_N == self.tokens).any()):
            return None
        out_BTE = values.new_full((self.rows, self.tokens, values.shape[-1]), missing)
        out_BTE[row_N.to(values.device), position_N.to(values.device)] = values_NE
        return out_BTE
