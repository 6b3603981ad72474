"""The operations for compiled graphs: ``spectr::choose``, ``spectr::add_update`` and ``spectr::add_update_``.

Each calls the backend of its tensors' device if that supports them, and torch otherwise. Torch computes the gradients.
Eager code does not use these operations: a call through torch's dispatcher takes 5 to 14 microseconds for each layer.

Legend: T tokens, I inputs, O outputs, E experts, R the rank of each expert, P = E R, B rows; each row of a prior or of
weights belongs to an equal share of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from spectr.ops.add_outputs import weighted
from spectr.ops.backend import Selector
from spectr.ops.dispatch import backend_for
from spectr.ops.rules import RULES
from spectr.selection import TopK

_NUMBERS = "int experts, int k, float temperature, str rule"
_FACTORS = "Tensor x, Tensor A, Tensor Bt, Tensor? centers, Tensor? rows"


def choose(
    h: Tensor, centers: Tensor | None, prior: Tensor | None, experts: int, k: int, temperature: float, rule: str
) -> Tensor:
    """``w_t h_t`` for each token's ``k`` best experts, and zero for the others. Of equal experts, the first is taken.

    Args:
        h: ``A x`` for all experts, (..., P).
        centers: Subtracted from ``h`` before scoring, (P,), or ``None``.
        prior: Multiplied with the scores, float32, (B, ..., E), or ``None``.
        experts: Number of experts; all have the same rank.
        k: Number of experts that a token takes.
        temperature: Of the softmax over the chosen experts' scores; 0 gives each the weight ``1 / k``.
        rule: Name of the scoring rule, a key of :data:`spectr.ops.rules.RULES`.
    """
    select, backend = Selector(experts, k, temperature, rule), backend_for(h.device.type).backend
    if backend is not None and rule in backend.rules and backend.know(h):
        weighted_TP = h.clone()
        if backend.choose(weighted_TP, _plain(centers), _plain(prior), select):
            return weighted_TP
    return choose_by_torch(h, centers, prior, select)


def add_update_(
    out: Tensor,
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    centers: Tensor | None,
    rows: Tensor | None,
    experts: int,
    k: int,
    temperature: float,
    rule: str,
) -> None:
    """Add the experts' update to the base layer's output in place.

    Args:
        out: The base layer's output, (..., O). All tensors but the prior have one dtype, and all one device.
        x: The layer's input, (..., I).
        A: Input factors of all experts, (P, I).
        Bt: Output factors of all experts, transposed, (P, O).
        centers: See :func:`choose`.
        rows: If tokens choose, the prior as in :func:`choose`; otherwise the fixed weights, (B, ..., P).
        experts: See :func:`choose`; 0 for fixed weights.
        k: See :func:`choose`.
        temperature: See :func:`choose`.
        rule: See :func:`choose`; empty for fixed weights.
    """
    select, backend = _selector(experts, k, temperature, rule), backend_for(x.device.type).backend
    x, rows, centers = x.contiguous(), _plain(rows), _plain(centers)
    casts = torch.is_autocast_enabled(x.device.type)  # also of products inside a backend
    scores = backend is not None and not casts and (select is None or rule in backend.rules)
    if backend is not None and scores and backend.know(x, out, A, Bt):
        if select is not None and backend.add_chosen(x, A, Bt, centers, rows, out, select):
            return
        if select is None and rows is not None and backend.add_weighted(x, A, Bt, rows, out):
            return
    out.add_(_weighted_products(x, A, centers, rows, select) @ Bt)


def add_update(
    out: Tensor,
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    centers: Tensor | None,
    rows: Tensor | None,
    experts: int,
    k: int,
    temperature: float,
    rule: str,
) -> Tensor:
    """:func:`add_update_`, out of place."""
    target = out.clone(memory_format=torch.contiguous_format)
    add_update_(target, x, A, Bt, centers, rows, experts, k, temperature, rule)
    return target


def choose_by_torch(h: Tensor, centers: Tensor | None, prior: Tensor | None, select: Selector) -> Tensor:
    """:func:`choose`, by torch's operations."""
    scores = RULES[select.rule](h, centers, select.experts)
    if prior is not None:
        scores = scores * _by_token(prior, h)
    weighting = "softmax" if select.temperature else "uniform"
    weights = TopK(k=select.k, weighting=weighting, temperature=select.temperature or 1.0)(scores)
    return weighted(h, weights, h.shape[-1] // select.experts)


def add_update_by_torch(
    out: Tensor,
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    centers: Tensor | None,
    rows: Tensor | None,
    select: Selector | None,
) -> Tensor:
    """:func:`add_update`, by torch's operations."""
    return out + _weighted_products(x, A, centers, rows, select) @ Bt


def _weighted_products(
    x: Tensor, A: Tensor, centers: Tensor | None, rows: Tensor | None, select: Selector | None
) -> Tensor:
    h = linear(x, A)
    if select is not None:
        return choose_by_torch(h, centers, rows, select)
    assert rows is not None
    return h * _by_token(rows, h)


def _selector(experts: int, k: int, temperature: float, rule: str) -> Selector | None:
    return Selector(experts, k, temperature, rule) if experts else None


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _by_token(rows: Tensor, h: Tensor) -> Tensor:
    """Expand (B, ..., N) to (..., N): each token gets the row of its share."""
    tokens = h.numel() // h.shape[-1]
    rows_BN = rows.reshape(len(rows), rows.shape[-1])
    return rows_BN.repeat_interleave(tokens // len(rows), 0).view(*h.shape[:-1], -1)


def _register() -> None:
    kept = "CompositeExplicitAutograd"
    for function, schema in (
        (choose, f"(Tensor h, Tensor? centers, Tensor? prior, {_NUMBERS}) -> Tensor"),
        (add_update, f"(Tensor out, {_FACTORS}, {_NUMBERS}) -> Tensor"),
        (add_update_, f"(Tensor(a!) out, {_FACTORS}, {_NUMBERS}) -> ()"),
    ):
        name = f"spectr::{function.__name__}"
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, kept, function)
    torch.library.register_fake("spectr::choose", lambda h, *_: h.new_empty(h.shape))
    torch.library.register_fake("spectr::add_update", lambda out, *_: out.new_empty(out.shape))
    torch.library.register_fake("spectr::add_update_", lambda *_: None)
    for name, function in (("choose", _choose_again), ("add_update", _add_again)):
        backward, keep = _gradients(function)
        torch.library.register_autograd(f"spectr::{name}", backward, setup_context=keep)


def _choose_again(h: Tensor, centers: Tensor | None, prior: Tensor | None, *numbers: Any) -> Tensor:
    return choose_by_torch(h, centers, prior, Selector(*numbers))


def _add_again(
    out: Tensor, x: Tensor, A: Tensor, Bt: Tensor, centers: Tensor | None, rows: Tensor | None, *numbers: Any
) -> Tensor:
    return add_update_by_torch(out, x, A, Bt, centers, rows, _selector(*numbers))


def _gradients(again: Any) -> tuple[Any, Any]:
    """Backward pass and context setup of an operation; the backward pass recomputes it by torch."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(given for given in inputs if isinstance(given, Tensor)))
        ctx.others = [None if isinstance(given, Tensor) else (given,) for given in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, needed = iter(ctx.saved_tensors), ctx.needs_input_grad
        with torch.enable_grad():
            given = [
                next(saved).detach().requires_grad_(needs) if other is None else other[0]
                for other, needs in zip(ctx.others, needed, strict=True)
            ]
            wanted = [tensor for tensor, needs in zip(given, needed, strict=True) if needs]
            found = iter(torch.autograd.grad(again(*given), wanted, grad, allow_unused=True))
        return tuple(next(found) if needs else None for needs in needed)

    return backward, keep


_register()
