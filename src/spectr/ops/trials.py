"""Timing the ways to compute a layer of some shape on this machine, and choosing by that."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn.functional import linear

from spectr.atomic_write import cache_folder
from spectr.hashing import package_versions
from spectr.ops.add_outputs import add_masked, gathered_sum, gathering_pays, weighted
from spectr.ops.backend import Selector
from spectr.ops.fused_linear import Experts, FusedCpuLinear, Layer, Way
from spectr.ops.rules import RULES
from spectr.ops.timing import REAL, Clock, time_in_turn
from spectr.ops.way_times import TimedShapes, WayTimes
from spectr.ops.ways import TOKENS, TORCH, Shape, Table, after_base, as_wanted, described, fastest, wanted
from spectr.selection import TopK

_CACHES = 48 << 20  # bytes that a cache of a processor hardly keeps from one call to the next
_MOST_LAYERS = 64
_PATTERN = 65_537  # numbers that are drawn, a prime, so that no two rows are the same
_LINE = 64  # numbers that begin a line of the processor's cache, whatever their dtype
_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


class HasWays(Protocol):
    """What a backend tells of itself."""

    def ways(self, dtype: torch.dtype, chooses: bool) -> Mapping[str, Way]:
        """All ways to compute a layer, by name."""
        ...


class Trials:
    """Which way serves how many tokens: what the user wants, or what takes the least time here.

    Args:
        backend: Whose ways these are.
        source: Changes with the backend's code and its machine.
    """

    def __init__(self, backend: HasWays, source: str):
        self._backend, self._source, self._wishes = backend, source, wanted()
        self._by_threads: dict[int, TimedShapes] = {}
        self._after: dict[Shape, tuple[Way | None, ...]] = {}

    def best(self, shape: Shape) -> tuple[Way | None, ...]:
        """The ways of a plain linear layer of this shape, timed where they are not known."""
        return self._ways(shape, self._table(shape, self._timed(shape)))

    def after_base(self, shape: Shape) -> tuple[Way | None, ...]:
        """The ways of a layer whose base layer has answered already. Nothing is timed for that."""
        found = self._after.get(shape)
        if found is None:
            times = self._shapes().nearest(shape)
            found = self._ways(shape, self._table(shape, times, after_base))
            if self._wishes or times is not None:
                self._after[shape] = found
        return found

    def reason(self, shape: Shape, *, whole: bool) -> str:
        """What :meth:`best` or :meth:`after_base` go by, for reports; timed where that is not known."""
        times = self._timed(shape)
        self._after.pop(shape, None)
        table = self._table(shape, times, (lambda way: True) if whole else after_base)
        origin = "as SPECTR_KERNELS says" if times is None else times.origin
        return f"{shape.inputs} to {shape.outputs}, {described(table)} ({origin})"

    def _table(self, shape: Shape, times: WayTimes | None, among: Callable[[str], bool] = bool) -> Table:
        if self._wishes:
            return as_wanted(self._wishes, [*filter(among, self._backend.ways(shape.dtype, shape.k > 0))])
        return fastest([{}] * len(TOKENS) if times is None else times.seconds, among)

    def _ways(self, shape: Shape, table: Table) -> tuple[Way | None, ...]:
        ways = self._backend.ways(shape.dtype, shape.k > 0)
        return tuple(map(ways.get, table))

    def _timed(self, shape: Shape) -> WayTimes | None:
        if self._wishes:
            return None
        shapes = self._shapes()
        if _len_torch_dispatch_stack():  # a mode records single operations, which kernels do not make
            return shapes.nearest(shape) or WayTimes([{}] * len(TOKENS), "not timed under a mode of torch")
        return shapes.of(shape)

    def _shapes(self) -> TimedShapes:
        threads = torch.get_num_threads()
        if threads not in self._by_threads:
            parts = (self._source, package_versions("spectr-lora"), torch.__version__, threads, *_settings())
            name = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
            self._by_threads[threads] = TimedShapes(cache_folder() / "kernels" / f"times-{name}.json", self._measure)
        return self._by_threads[threads]

    def _measure(self, shape: Shape, seconds: float, alone: bool) -> list[dict[str, float]]:
        ways, threads = self._backend.ways(shape.dtype, shape.k > 0), torch.get_num_threads()
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if not alone:
                return measure(ways, shape, seconds)
            torch.set_num_threads(1)
            try:
                return measure(ways, shape, seconds, Clock(now=time.thread_time))
            finally:
                torch.set_num_threads(threads)


def _settings() -> tuple[str, ...]:
    """What torch's and our products depend on besides."""
    return torch.get_float32_matmul_precision(), *(f"{name}={os.environ.get(name)}" for name in _VARIABLES)


def measure(
    ways: Mapping[str, Way],
    shape: Shape,
    seconds: float,
    clock: Clock = REAL,
) -> list[dict[str, float]]:
    """Seconds of each way and of torch, for each number of tokens that is timed.

    What would take too long is not timed: there torch computes the base layer, and the rest goes by fewer tokens.

    Args:
        ways: By name.
        shape: Of the layer.
        seconds: That this may take, roughly.
        clock: To time by.
    """
    found: list[dict[str, float]] = []
    layers, began = _Layers(shape), clock.now()
    for place, tokens in enumerate(TOKENS):
        left = seconds - (clock.now() - began)
        if found and _next_takes(found[-1]) > left:
            found.append({way: time for way, time in found[-1].items() if "+" in way or way == TORCH})
            continue
        x = layers.tokens(tokens)
        calls = {name: partial(layers.by, way, x) for name, way in ways.items()} | {TORCH: partial(layers.by, None, x)}
        found.append(time_in_turn(calls, left / (len(TOKENS) - place), clock))
    return found


def _next_takes(times: Mapping[str, float]) -> float:
    """About how long two calls of each way take for four times the tokens."""
    return 8 * sum(times.values())


class _Layers:
    """Layers of one shape that take turns, so that each call reads its layer from memory, as in a model.

    Args:
        shape: Of all.
    """

    def __init__(self, shape: Shape):
        self._shape, self._turn = shape, 0
        chance = torch.Generator().manual_seed(0)
        self._pattern = torch.randn(_PATTERN, generator=chance, device="cpu", dtype=torch.float32).to(shape.dtype)
        dtype, inputs, outputs, rank, experts, k = shape
        rows = rank * experts
        sizes = [(outputs, inputs), (rows, inputs), (rows, outputs)]
        places = [_aligned(a * b) for a, b in sizes]
        count = min(max(_CACHES // (dtype.itemsize * sum(places)), 1), _MOST_LAYERS)
        numbers = self._pattern.repeat(-(-count * sum(places) // _PATTERN))
        parts = iter(numbers[: count * sum(places)].split(places * count))
        select = Selector(experts, k, 0.0) if k else None
        self._layers = list[FusedCpuLinear]()
        for _ in range(count):
            W, A, Bt = (next(parts)[: a * b].view(a, b) for a, b in sizes)
            self._layers.append(self._layer(W, A, Bt, select))
        self._weights = self._pattern[:rows].view(1, 1, rows).clone()

    @staticmethod
    def _layer(W: Tensor, A: Tensor, Bt: Tensor, select: Selector | None) -> FusedCpuLinear:
        base = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(W, requires_grad=False)
        return FusedCpuLinear(base, Experts(Layer.of(A, Bt, None, select), A, Bt, None), ())

    def tokens(self, count: int) -> Tensor:
        """Inputs of this number of tokens."""
        numbers = count * self._shape.inputs
        return self._pattern.repeat(-(-numbers // _PATTERN))[:numbers].view(count, -1)

    def by(self, way: Way | None, x: Tensor) -> Tensor | None:
        """The output of the next layer by a way, or by torch."""
        self._turn = (self._turn + 1) % len(self._layers)
        layer, rows = self._layers[self._turn], None if self._shape.k else self._weights
        if way is None:
            return _by_torch(layer, x, rows, self._shape)
        layer.ways = (way,) * len(TOKENS)
        return layer(x, rows)


def _aligned(numbers: int) -> int:
    """This number, rounded up to whole lines of the processor's cache."""
    return -(-numbers // _LINE) * _LINE


def _by_torch(layer: FusedCpuLinear, x: Tensor, weights: Tensor | None, shape: Shape) -> Tensor:
    """As a layer without kernels computes."""
    A, B, rank, experts = layer.experts.A_PI, layer.experts.Bt_PO.mT, shape.rank, shape.experts
    out, h, select = linear(x, layer.base.weight), linear(x, A), TopK(k=shape.k or 1)
    if weights is not None:
        return add_masked(out, h * weights[0], B, in_place=True)
    scores = RULES["lengths"](h, None, experts)
    if not gathering_pays(select, experts, rank):
        return add_masked(out, weighted(h, select(scores), rank), B, in_place=True)
    rows = torch.arange(rank * experts).view(experts, rank)
    return out.add_(gathered_sum(h, *select.choose(scores), B, rows))
