"""The kernels for GPUs, in Triton, which comes with torch's builds for them."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch.nn.functional import linear
from triton.language import constexpr

from spectr.layers.kernels.base import Choice, Kernels, Whole, own_numbers

tl: Any = triton.language  # what it means inside a kernel is not what its signatures say
_BLOCK = 128  # outputs that a program adds to
_MOST_ROWS = 16384  # numbers of one token that a program holds
_FEW = 64  # tokens up to which one kernel chooses and adds; of more, it weighs, and a product with all experts adds
_VARIES = ("tokens", "rows_of_prior")  # from call to call: no code of its own for numbers that 16 divides


@triton.jit
def _scored(
    h,
    centers,
    prior,
    token,
    row,
    EXPERTS: constexpr,
    RANK: constexpr,
    E: constexpr,
    R: constexpr,
    CENTERED: constexpr,
    INFORMED: constexpr,
):
    """A token's ``A x`` and the experts' scores; of what is no expert, minus infinity."""
    e, r = tl.arange(0, E), tl.arange(0, R)
    e_E1, r_1R = tl.expand_dims(e, 1), tl.expand_dims(r, 0)
    place = e_E1 * RANK + r_1R
    there = (e_E1 < EXPERTS) & (r_1R < RANK)
    h_ER = tl.load(h + token * EXPERTS * RANK + place, mask=there, other=0.0)
    scored_ER = h_ER
    if CENTERED:
        scored_ER = h_ER - tl.load(centers + place, mask=there, other=0.0)
    h_ER, scored_ER = h_ER.to(tl.float32), scored_ER.to(tl.float32)
    scores_E = tl.sqrt(tl.sum(scored_ER * scored_ER, 1))
    if INFORMED:
        scores_E *= tl.load(prior + row * EXPERTS + e, mask=e < EXPERTS, other=0.0)
    left_E = tl.where(e < EXPERTS, scores_E, float("-inf"))
    return h_ER, tl.where(scores_E < float("inf"), left_E, float("inf"))  # of what is no number any choice gives none


@triton.jit(do_not_specialize=_VARIES)
def _add_chosen(
    h,
    centers,
    prior,
    Bt,
    out,
    tokens,
    rows_of_prior,
    temperature,
    EXPERTS: constexpr,
    RANK: constexpr,
    K: constexpr,
    E: constexpr,
    R: constexpr,
    CENTERED: constexpr,
    INFORMED: constexpr,
    SOFTMAX: constexpr,
    OUTPUTS: constexpr,
    BLOCK: constexpr,
):
    """One token, one block of its outputs: choose K times the best that is left, and add its part."""
    token = tl.program_id(0).to(tl.int64)
    row = token * rows_of_prior // tokens
    h_ER, left_E = _scored(h, centers, prior, token, row, EXPERTS, RANK, E, R, CENTERED, INFORMED)
    e, o = tl.arange(0, E), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    e_E1, r_R1, o_1O = tl.expand_dims(e, 1), tl.expand_dims(tl.arange(0, R), 1), tl.expand_dims(o, 0)
    here = (r_R1 < RANK) & (o_1O < OUTPUTS)
    best = tl.max(left_E, 0)
    total = 0.0
    sum_O = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(K):
        chosen = tl.argmax(left_E, 0)
        weight = 1.0
        if SOFTMAX:
            weight = tl.exp((tl.max(left_E, 0) - best) / temperature)
        total += weight
        h_R = tl.sum(tl.where(e_E1 == chosen, h_ER, 0.0), 0)
        B_RO = tl.load(Bt + (chosen.to(tl.int64) * RANK + r_R1) * OUTPUTS + o_1O, mask=here, other=0.0).to(tl.float32)
        sum_O += weight * tl.sum(tl.expand_dims(h_R, 1) * B_RO, 0)
        left_E = tl.where(e == chosen, float("-inf"), left_E)
    target = out + token * OUTPUTS + o
    before_O = tl.load(target, mask=o < OUTPUTS, other=0.0).to(tl.float32)
    tl.store(target, (before_O + sum_O / total).to(out.dtype.element_ty), mask=o < OUTPUTS)


@triton.jit(do_not_specialize=_VARIES)
def _weigh(
    h,
    centers,
    prior,
    tokens,
    rows_of_prior,
    temperature,
    EXPERTS: constexpr,
    RANK: constexpr,
    K: constexpr,
    E: constexpr,
    R: constexpr,
    CENTERED: constexpr,
    INFORMED: constexpr,
    SOFTMAX: constexpr,
):
    """One token: its ``A x`` times the weights of the K best experts, zero for the others, in its place."""
    token = tl.program_id(0).to(tl.int64)
    row = token * rows_of_prior // tokens
    h_ER, left_E = _scored(h, centers, prior, token, row, EXPERTS, RANK, E, R, CENTERED, INFORMED)
    e = tl.arange(0, E)
    best = tl.max(left_E, 0)
    total = 0.0
    weights_E = tl.zeros((E,), tl.float32)
    for _ in tl.static_range(K):
        chosen = tl.argmax(left_E, 0)
        weight = 1.0
        if SOFTMAX:
            weight = tl.exp((tl.max(left_E, 0) - best) / temperature)
        total += weight
        weights_E = tl.where(e == chosen, weight, weights_E)
        left_E = tl.where(e == chosen, float("-inf"), left_E)
    e_E1, r_1R = tl.expand_dims(e, 1), tl.expand_dims(tl.arange(0, R), 0)
    there = (e_E1 < EXPERTS) & (r_1R < RANK)
    weighted_ER = h_ER * tl.expand_dims(weights_E / total, 1)
    tl.store(h + token * EXPERTS * RANK + e_E1 * RANK + r_1R, weighted_ER.to(h.dtype.element_ty), mask=there)


class _Form(NamedTuple):
    """What a kernel's code is made for, in the order of its arguments."""

    experts: int
    rank: int
    k: int
    experts_held: int
    rank_held: int
    centered: bool
    informed: bool
    softmax: bool

    @property
    def fits(self) -> bool:
        """Whether a program holds one token's numbers."""
        return self.experts_held * self.rank_held <= _MOST_ROWS

    @property
    def warps(self) -> int:
        """That share one token's numbers."""
        return 4 if self.experts_held * self.rank_held <= 4096 else 8


class GpuKernels(Kernels):
    """A routed layer in two calls, ``A x`` by torch and the rest; of many tokens in three.

    Args:
        device: The kind of device; ``cpu`` under Triton's interpreter.
    """

    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, device: str = "cuda"):
        self.device = device
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def route(
        self,
        x: Tensor,
        A_PI: Tensor,
        Bt_PO: Tensor,
        centers_P: Tensor | None,
        prior_BE: Tensor | None,
        out: Tensor,
        choice: Choice,
    ) -> bool:
        """See :meth:`Kernels.route`."""
        form = _form(Bt_PO, centers_P, prior_BE, choice)
        if not form.fits:
            return False
        h = linear(x, A_PI)
        rows, outputs = Bt_PO.shape
        tokens = h.numel() // rows
        read = (h, h if centers_P is None else centers_P, h if prior_BE is None else prior_BE)
        numbers = (tokens, 1 if prior_BE is None else len(prior_BE), choice.temperature or 1.0)
        if tokens <= _FEW:
            grid = (tokens, triton.cdiv(outputs, _BLOCK), 1)
            self._run(_add_chosen, grid, (*read, Bt_PO, out), numbers, (*form, outputs, _BLOCK), form.warps)
            return True
        self._run(_weigh, (tokens, 1, 1), read, numbers, form, form.warps)
        sums = out.view(tokens, outputs)
        torch.addmm(sums, h.view(tokens, rows), Bt_PO, out=sums)
        return True

    def whole(
        self, base: nn.Module, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, choice: Choice | None
    ) -> Whole | None:
        """See :meth:`Kernels.whole`."""
        if type(base) is not nn.Linear or choice is None or not _form(Bt_PO, centers_P, None, choice).fits:
            return None
        return _WholeLayer(self, base, (A_PI, Bt_PO, centers_P), choice)

    def _run(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        numbers: tuple[int, int, float],
        form: tuple[int, ...],
        warps: int,
    ) -> None:
        """Launch a kernel: the first time as Triton does, which takes long to find the code; then that code itself."""
        x = tensors[0]
        places = tuple(t.data_ptr() for t in tensors)
        aligned = not any(place % 16 for place in places)
        key = (kernel, form, x.dtype, x.device)
        here: AbstractContextManager = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
        with here:
            if aligned and key in self._compiled:
                self._compiled[key][grid](*places, *numbers, *form)
                return
            compiled = kernel[grid](*tensors, *numbers, *form, num_warps=warps)
        if aligned and compiled is not None:
            self._compiled[key] = compiled


class _WholeLayer:
    """A base layer and its experts; see :class:`spectr.layers.kernels.base.Whole`."""

    def __init__(
        self, kernels: GpuKernels, base: nn.Linear, factors: tuple[Tensor, Tensor, Tensor | None], choice: Choice
    ):
        self.kernels, self.base, self.factors, self.choice = kernels, base, factors, choice

    def __call__(self, x: Tensor, rows: Tensor | None) -> Tensor | None:
        numbers = own_numbers(self.base, x)
        if numbers is None:
            return None
        out = linear(x, *numbers)
        return out if self.kernels.route(x, *self.factors, rows, out, self.choice) else None


def _form(Bt_PO: Tensor, centers_P: Tensor | None, prior_BE: Tensor | None, choice: Choice) -> _Form:
    rank = len(Bt_PO) // choice.experts
    held = triton.next_power_of_2(choice.experts), triton.next_power_of_2(rank)
    informed = prior_BE is not None
    return _Form(choice.experts, rank, choice.k, *held, centers_P is not None, informed, choice.temperature > 0)


@lru_cache(maxsize=1)
def gpu_kernels() -> Kernels | None:
    """The kernels for this machine's GPUs; ``None`` where they are not wanted, or do not run."""
    if os.environ.get("SPECTR_KERNELS") == "0":
        return None
    kernels = GpuKernels()
    try:
        with torch.inference_mode():
            A, Bt = (torch.ones(1, 16, device="cuda") for _ in range(2))
            for tokens in (1, 1, _FEW + 1, _FEW + 1):  # each twice: there is a short way for the second time
                x, out = (torch.ones(tokens, 16, device="cuda") for _ in range(2))
                kernels.route(x, A, Bt, None, None, out, Choice(experts=1, k=1, temperature=0.0))
                if not bool((out == 17).all()):
                    raise RuntimeError("a wrong sum")
    except Exception as error:  # compilers and drivers raise whatever they like
        logging.getLogger(__name__).info("routed layers run without a GPU kernel: %s", error)
        return None
    return kernels
