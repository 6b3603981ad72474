"""The kernel for GPUs, in Triton, which comes with torch's builds for them."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear
from triton.language import constexpr

from spectr.layers.kernels.base import Choice, Kernels

tl: Any = triton.language  # what it means inside a kernel is not what its signatures say
_BLOCK = 128  # outputs that a program adds to
_MOST_ROWS = 16384  # numbers of one token that a program holds


@triton.jit
def _add_chosen(
    h,
    centers,
    prior,
    Bt,
    out,
    tokens,
    rows_of_prior,
    outputs,
    temperature,
    EXPERTS: constexpr,
    RANK: constexpr,
    K: constexpr,
    E: constexpr,
    R: constexpr,
    BLOCK: constexpr,
    CENTERED: constexpr,
    INFORMED: constexpr,
    SOFTMAX: constexpr,
):
    """One token, one block of its outputs: score, choose K times the best that is left, and add its part."""
    token = tl.program_id(0).to(tl.int64)
    e, r = tl.arange(0, E), tl.arange(0, R)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    e_E1, r_1R, r_R1, o_1O = tl.expand_dims(e, 1), tl.expand_dims(r, 0), tl.expand_dims(r, 1), tl.expand_dims(o, 0)
    place = e_E1 * RANK + r_1R
    there = (e_E1 < EXPERTS) & (r_1R < RANK)
    h_ER = tl.load(h + token * EXPERTS * RANK + place, mask=there, other=0.0)
    scored_ER = h_ER
    if CENTERED:
        scored_ER = h_ER - tl.load(centers + place, mask=there, other=0.0)
    h_ER, scored_ER = h_ER.to(tl.float32), scored_ER.to(tl.float32)
    scores_E = tl.sqrt(tl.sum(scored_ER * scored_ER, 1))
    if INFORMED:
        row = token * rows_of_prior // tokens
        scores_E *= tl.load(prior + row * EXPERTS + e, mask=e < EXPERTS, other=0.0)
    left_E = tl.where(e < EXPERTS, scores_E, float("-inf"))
    left_E = tl.where(scores_E < float("inf"), left_E, float("inf"))  # of what is no number any choice gives none
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
        here = (r_R1 < RANK) & (o_1O < outputs)
        B_RO = tl.load(Bt + (chosen.to(tl.int64) * RANK + r_R1) * outputs + o_1O, mask=here, other=0.0).to(tl.float32)
        sum_O += weight * tl.sum(tl.expand_dims(h_R, 1) * B_RO, 0)
        left_E = tl.where(e == chosen, float("-inf"), left_E)
    target = out + token * outputs + o
    before_O = tl.load(target, mask=o < outputs, other=0.0).to(tl.float32)
    tl.store(target, (before_O + sum_O / total).to(out.dtype.element_ty), mask=o < outputs)


class GpuKernels(Kernels):
    """A routed layer in two calls: ``A x`` by torch, and the rest.

    Args:
        device: The kind of device; ``cpu`` under Triton's interpreter.
    """

    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, device: str = "cuda"):
        self.device = device

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
        experts, k, temperature = choice
        rank, outputs = len(A_PI) // experts, Bt_PO.shape[1]
        E, R = triton.next_power_of_2(experts), triton.next_power_of_2(rank)
        if E * R > _MOST_ROWS:
            return False
        h = linear(x, A_PI)
        tokens = h.numel() // len(A_PI)
        here: AbstractContextManager = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
        run: Any = _add_chosen[(tokens, triton.cdiv(outputs, _BLOCK))]  # Triton turns constants into its own type
        with here:
            run(
                h,
                h if centers_P is None else centers_P,
                h if prior_BE is None else prior_BE,
                Bt_PO,
                out,
                tokens,
                1 if prior_BE is None else len(prior_BE),
                outputs,
                temperature if temperature > 0 else 1.0,
                EXPERTS=experts,
                RANK=rank,
                K=k,
                E=E,
                R=R,
                BLOCK=_BLOCK,
                CENTERED=centers_P is not None,
                INFORMED=prior_BE is not None,
                SOFTMAX=temperature > 0,
                num_warps=4 if E * R <= 4096 else 8,
            )
        return True


@lru_cache(maxsize=1)
def gpu_kernels() -> Kernels | None:
    """The kernels for this machine's GPUs; ``None`` where they are not wanted, or do not run."""
    if os.environ.get("SPECTR_KERNELS") == "0":
        return None
    kernels = GpuKernels()
    try:
        with torch.inference_mode():
            A, Bt, out = (torch.ones(1, 16, device="cuda") for _ in range(3))
            kernels.route(A, A, Bt, None, None, out, Choice(experts=1, k=1, temperature=0.0))
            torch.cuda.synchronize()
    except Exception as error:  # compilers and drivers raise whatever they like
        logging.getLogger(__name__).info("routed layers run without a GPU kernel: %s", error)
        return None
    return kernels
