"""The backend for GPUs, in Triton, which comes with torch's builds for them. Its plain form is in reference.py."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch.nn.functional import linear
from triton.language import constexpr

from spectr.ops.backend import Backend, FusedLinear, Selector, own_numbers

tl: Any = triton.language  # its meaning inside a kernel differs from its signature
_BLOCK = 64  # outputs that a program adds to, at most
_BLOCK_ROWS = 8192  # numbers of the output factors that it holds, within any GPU's shared memory
_FEW = 8192  # numbers of all tokens up to which one kernel weighs and adds; of more, a product with all experts adds
_AT_ONCE = 16  # tokens that such a program takes, as few as the matrix unit does
_MOST_AT_ONCE = 256  # numbers of each of these tokens
_WEIGHED = 512  # numbers that a program weighs, if one token has at most that many
_MOST_ROWS = 16384  # numbers of one token that a program holds
_VARIES = ("tokens", "rows_of_prior")  # differs from call to call: no separate code for multiples of 16


@triton.jit
def _weighted(
    h,
    centers,
    prior,
    t,
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
    """``A x`` of some tokens times the weights of the K best experts, zero for the others, float32: (T, E, R).

    With where these numbers are in (tokens, EXPERTS, RANK), and which of them there are.
    """
    e, r = tl.arange(0, E), tl.arange(0, R)
    place_ER = tl.expand_dims(e, 1) * RANK + tl.expand_dims(r, 0)
    there_ER = (tl.expand_dims(e, 1) < EXPERTS) & (tl.expand_dims(r, 0) < RANK)
    t_T11 = tl.expand_dims(tl.expand_dims(t, 1), 2)
    place_TER = t_T11 * EXPERTS * RANK + tl.expand_dims(place_ER, 0)
    there_TER = (t_T11 < tokens) & tl.expand_dims(there_ER, 0)
    h_TER = tl.load(h + place_TER, mask=there_TER, other=0.0)
    scored_TER = h_TER
    if CENTERED:
        scored_TER = h_TER - tl.expand_dims(tl.load(centers + place_ER, mask=there_ER, other=0.0), 0)
    h_TER, scored_TER = h_TER.to(tl.float32), scored_TER.to(tl.float32)
    scores_TE = tl.sqrt(tl.sum(scored_TER * scored_TER, 2))
    e_1E, t_T1 = tl.expand_dims(e, 0), tl.expand_dims(t, 1)
    if INFORMED:
        row_T1 = t_T1 * rows_of_prior // tokens
        known_TE = (e_1E < EXPERTS) & (t_T1 < tokens)
        scores_TE *= tl.load(prior + row_T1 * EXPERTS + e_1E, mask=known_TE, other=0.0)
    left_TE = tl.where(e_1E < EXPERTS, scores_TE, float("-inf"))
    left_TE = tl.where(scores_TE < float("inf"), left_TE, float("inf"))  # with NaN, every choice gives NaN
    best_T = tl.max(left_TE, 1)
    total_T = best_T * 0.0
    weights_TE = scores_TE * 0.0
    for _ in tl.static_range(K):
        chosen_TE = e_1E == tl.expand_dims(tl.argmax(left_TE, 1), 1)
        weight_T = tl.zeros_like(total_T) + 1.0
        if SOFTMAX:
            weight_T = tl.exp((tl.max(left_TE, 1) - best_T) / temperature)
        total_T += weight_T
        weights_TE = tl.where(chosen_TE, tl.expand_dims(weight_T, 1), weights_TE)
        left_TE = tl.where(chosen_TE, float("-inf"), left_TE)
    return h_TER * tl.expand_dims(weights_TE / tl.expand_dims(total_T, 1), 2), place_TER, there_TER


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
    T: constexpr,
    OUTPUTS: constexpr,
    BLOCK: constexpr,
):
    """T tokens, one block of their outputs: weigh, and add the product."""
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_P1, o_1O = tl.expand_dims(tl.arange(0, E * R), 1), tl.expand_dims(o, 0)
    row_P1 = (p_P1 // R) * RANK + p_P1 % R
    there_PO = (p_P1 // R < EXPERTS) & (p_P1 % R < RANK) & (o_1O < OUTPUTS)
    Bt_PO = tl.load(Bt + row_P1 * OUTPUTS + o_1O, mask=there_PO, other=0.0)
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    weighted_TER, _, _ = _weighted(
        h, centers, prior, t, tokens, rows_of_prior, temperature,
        EXPERTS, RANK, K, E, R, CENTERED, INFORMED, SOFTMAX,
    )  # fmt: skip
    weighted_TP = tl.reshape(weighted_TER, (T, E * R))
    if Bt.dtype.element_ty == tl.float32:
        sums_TO = tl.dot(weighted_TP, Bt_PO, input_precision="tf32x3")  # three products of halves: float32's digits
    else:
        sums_TO = tl.dot(weighted_TP, Bt_PO.to(tl.float32), input_precision="tf32")  # has all digits of short numbers
    t_T1 = tl.expand_dims(t, 1)
    target_TO, here_TO = out + t_T1 * OUTPUTS + o_1O, (t_T1 < tokens) & (o_1O < OUTPUTS)
    sums_TO += tl.load(target_TO, mask=here_TO, other=0.0).to(tl.float32)
    tl.store(target_TO, sums_TO.to(out.dtype.element_ty), mask=here_TO)


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
    T: constexpr,
):
    """T tokens: their weighted ``A x`` in its place."""
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    weighted_TER, place_TER, there_TER = _weighted(
        h, centers, prior, t, tokens, rows_of_prior, temperature,
        EXPERTS, RANK, K, E, R, CENTERED, INFORMED, SOFTMAX,
    )  # fmt: skip
    tl.store(h + place_TER, weighted_TER.to(h.dtype.element_ty), mask=there_TER)


class _Form(NamedTuple):
    """What a kernel's code is made for, in the order of its arguments."""

    experts: int
    rank: int
    k: int
    experts_padded: int
    rank_padded: int
    centered: bool
    informed: bool
    softmax: bool

    @property
    def size(self) -> int:
        """Numbers of one token that a program holds."""
        return self.experts_padded * self.rank_padded


class GpuBackend(Backend):
    """A routed layer in two calls, ``A x`` by torch and the rest; of many tokens in three.

    Args:
        device: The kind of device; ``cpu`` under Triton's interpreter.
    """

    name = "Triton"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, device: str = "cuda"):
        self.device = device
        self._compiled: dict[tuple[Any, ...], Any] = {}
        self._prepared: set[tuple[Any, ...]] = set()

    def prepare(
        self, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, select: Selector | None, linear: FusedLinear | None
    ) -> str:
        """See :meth:`Backend.prepare`: one call of few tokens and one of many, with a prior and without."""
        key = (Bt_PO.shape, select, centers_P is None, A_PI.dtype, A_PI.device)
        if self.device == "cuda" and select is not None and key not in self._prepared:
            self._prepared.add(key)
            self.warm_up(A_PI, Bt_PO, centers_P, select)
        return ""

    @torch.no_grad()
    def warm_up(self, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, select: Selector) -> None:
        """Launch each kernel that calls of this form launch."""
        size = _form(len(Bt_PO), select, False, False).size
        for tokens in (1, _FEW // size + 1):
            x, out = A_PI.new_zeros(tokens, A_PI.shape[1]), A_PI.new_zeros(tokens, Bt_PO.shape[1])
            for prior_BE in (None, torch.ones(1, select.experts, device=A_PI.device, dtype=torch.float32)):
                self.add_chosen(x, A_PI, Bt_PO, centers_P, prior_BE, out, select)

    def choose(self, h_TP: Tensor, centers_P: Tensor | None, prior_BE: Tensor | None, select: Selector) -> bool:
        """See :meth:`Backend.choose`."""
        form = _form(h_TP.shape[-1], select, centers_P is not None, prior_BE is not None)
        if form.size <= _MOST_ROWS:
            self._choose(h_TP, centers_P, prior_BE, select, form)
        return form.size <= _MOST_ROWS

    def _choose(
        self, h: Tensor, centers_P: Tensor | None, prior_BE: Tensor | None, select: Selector, form: _Form
    ) -> None:
        tokens, at_once = h.numel() // h.shape[-1], max(1, _WEIGHED // form.size)
        read, numbers = _arguments(h, centers_P, prior_BE, select)
        self._run(_weigh, (triton.cdiv(tokens, at_once), 1, 1), read, numbers, (*form, at_once))

    def add_chosen(
        self,
        x: Tensor,
        A_PI: Tensor,
        Bt_PO: Tensor,
        centers_P: Tensor | None,
        prior_BE: Tensor | None,
        out: Tensor,
        select: Selector,
    ) -> bool:
        """See :meth:`Backend.add_chosen`."""
        rows, outputs = Bt_PO.shape
        form = _form(rows, select, centers_P is not None, prior_BE is not None)
        if form.size > _MOST_ROWS:
            return False
        h = linear(x, A_PI)
        tokens = h.numel() // rows
        if tokens * form.size <= _FEW and form.size <= _MOST_AT_ONCE:
            block = min(_BLOCK, _BLOCK_ROWS // form.size)
            grid = (triton.cdiv(tokens, _AT_ONCE), triton.cdiv(outputs, block), 1)
            read, numbers = _arguments(h, centers_P, prior_BE, select)
            self._run(_add_chosen, grid, (*read, Bt_PO, out), numbers, (*form, _AT_ONCE, outputs, block))
            return True
        self._choose(h, centers_P, prior_BE, select, form)
        sums = out.view(tokens, outputs)
        torch.addmm(sums, h.view(tokens, rows), Bt_PO, out=sums)
        return True

    def fused_linear(
        self, base: nn.Module, A_PI: Tensor, Bt_PO: Tensor, centers_P: Tensor | None, select: Selector | None
    ) -> FusedLinear | None:
        """See :meth:`Backend.fused_linear`."""
        if type(base) is not nn.Linear or select is None or _form(len(Bt_PO), select, False, False).size > _MOST_ROWS:
            return None
        return _FusedGpuLinear(self, base, (A_PI, Bt_PO, centers_P), select)

    def _run(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        numbers: tuple[int, int, float],
        form: tuple[int, ...],
    ) -> None:
        """Launch a kernel: the first time as Triton does, which takes long to find the code; then that code itself."""
        x = tensors[0]
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self._run(kernel, grid, tensors, numbers, form)
        places = tuple(t.data_ptr() for t in tensors)
        key = (kernel, form, x.dtype, x.device.index)
        compiled, aligned = self._compiled.get(key), not any(place % 16 for place in places)
        if aligned and compiled is not None:
            compiled[grid](*places, *numbers, *form)
            return None
        compiled = kernel[grid](*tensors, *numbers, *form, num_warps=4)
        if aligned and compiled is not None:
            self._compiled[key] = compiled
        return None


class _FusedGpuLinear:
    """A :class:`spectr.ops.backend.FusedLinear`."""

    def __init__(
        self, kernels: GpuBackend, base: nn.Linear, factors: tuple[Tensor, Tensor, Tensor | None], select: Selector
    ):
        self.kernels, self.base, self.factors, self.select = kernels, base, factors, select

    def __call__(self, x: Tensor, rows: Tensor | None) -> Tensor | None:
        numbers = own_numbers(self.base, x)
        if numbers is None or not self.kernels.take(x, self.factors[0]):
            return None
        out = linear(x, *numbers)
        return out if self.kernels.add_chosen(x, *self.factors, rows, out, self.select) else None


@lru_cache(maxsize=4096)
def _form(rows: int, select: Selector, centered: bool, informed: bool) -> _Form:
    rank = rows // select.experts
    padded = triton.next_power_of_2(rank)
    experts_padded = max(triton.next_power_of_2(select.experts), 16 // padded)  # the smallest size of a product
    return _Form(select.experts, rank, select.k, experts_padded, padded, centered, informed, select.temperature > 0)


def _arguments(
    h: Tensor, centers_P: Tensor | None, prior_BE: Tensor | None, select: Selector
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, float]]:
    """The tensors that every kernel reads, and its numbers."""
    read = (h, h if centers_P is None else centers_P, h if prior_BE is None else prior_BE)
    rows = 1 if prior_BE is None else len(prior_BE)
    return read, (h.numel() // h.shape[-1], rows, select.temperature or 1.0)


def available() -> Backend:
    """The backend for this machine's GPUs.

    Raises:
        Exception: They do not run, or give a wrong sum; compilers and drivers raise whatever they like.
    """
    kernels = GpuBackend()
    with torch.inference_mode():
        A, Bt = (torch.ones(1, 16, device="cuda", dtype=torch.float32) for _ in range(2))
        for tokens in (1, 1, _FEW, _FEW):  # each twice: the second launch takes a shorter path
            x, out = (torch.ones(tokens, 16, device="cuda", dtype=torch.float32) for _ in range(2))
            kernels.add_chosen(x, A, Bt, None, None, out, Selector(experts=1, k=1, temperature=0.0))
            if not bool((out == 17).all()):
                raise RuntimeError("a wrong sum")
    return kernels
