"""Cheaper ways to the spectral choice: how often LAG and SEQR choose as the full score does, and the cost."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from spectr.adapters.write import Pair
from spectr.evaluation.experiments.costs import SAMPLE_TOKENS, sample_ids
from spectr.evaluation.experiments.robustness import changed_expert
from spectr.evaluation.experiments.setup import ExperimentSetup, Result
from spectr.flops import forward_flops
from spectr.layers import RoutedLinear
from spectr.library import ExpertLibrary
from spectr.models import context_length, encode_batch
from spectr.routers import Lag, Router, Seqr, Spectr

_SIZES = (1, 2, 3, 4, 6, 8, 16, 32)
Check = Callable[[RoutedLinear, Tensor], dict[str, Tensor]]


@torch.inference_mode()
def agreement(setup: ExperimentSetup) -> Result:
    """For LAG by length of its shortlist, and for SEQR among experts that share their input factor.

    Source: LoRA-Augmented Generation and SEQR (both Fleshman and Van Durme, 2025).
    """
    experts = len(setup.library)
    sizes = [size for size in _SIZES if size < experts]
    setup.progress("agreement", 0, 2, "LAG")
    hits = _agreeing(setup, Lag(shortlist=experts), lambda layer, x: _shortlisted(layer, x, sizes))
    full = _added(setup, Spectr(top_k=1))
    rows, data = [], {}
    for size in sizes:
        flops = _added(setup, Lag(shortlist=size))
        share = hits[str(size)]
        rows.append([f"lag, shortlist {size}", f"{share:.1%}", f"{flops / 1e6:.2f}", f"{flops / full:.2f}"])
        data[f"lag, shortlist {size}"] = {"agreement": share, "flops": flops / full}
    rows.append(["spectr, k 1", "", f"{full / 1e6:.2f}", "1.00"])
    setup.progress("agreement", 1, 2, "SEQR")
    with tempfile.TemporaryDirectory() as folder:
        shared = dataclasses.replace(setup, library=_with_one_A(setup.library, Path(folder)))
        found = _agreeing(shared, Seqr(), _by_the_whole_factor)
        flops, whole = _added(shared, Seqr()), _added(shared, Spectr(top_k=1))
    rows.append(["seqr, experts that share A", f"{found['first']:.1%}", f"{flops / 1e6:.2f}", f"{flops / whole:.2f}"])
    data["seqr, experts that share A"] = {"agreement": found["first"], "flops": flops / whole}
    setup.progress("agreement", 2, 2, "")
    return Result(
        name="agreement",
        title="Cheaper ways to the same choice",
        source="LAG and SEQR (Fleshman and Van Durme, 2025)",
        columns=["router", "same first choice as the full score", "added, MFLOP a token", "of SpectR's"],
        rows=rows,
        data={"routers": data, "experts": experts},
        notes=[
            "Share of tokens and modules, over the tasks' prompts, where the router chooses the expert with the "
            "largest ||delta_t x||. Every layer receives the inputs that it has with the full score. "
            f"Arithmetic measured on {SAMPLE_TOKENS} tokens, scores and updates together, one expert per token.",
            "SEQR needs experts that share A. Here each expert has its own B with the first expert's A: this says "
            "nothing about quality; such experts give no useful answers. Its score is the full score up to rounding.",
            *setup.remarks(),
        ],
        origin=setup.origin(),
    )


def _agreeing(setup: ExperimentSetup, router: Router, check: Check) -> dict[str, float]:
    """Shares of tokens and modules for which each of a layer's checks holds."""
    total, agreed = 0, Counter[str]()
    counted = torch.empty(0)

    def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        for name, agrees in check(layer, args[0]).items():
            agreed[name] += int(agrees[counted].sum())
        total += int(counted.sum())

    with setup.routed(router) as routed:
        for layer in routed.layers.values():
            layer.register_forward_pre_hook(hook)
        for _, examples in setup.owned.values():
            prompts, limit = [example.prompt for example in examples], context_length(setup.model)
            batch = encode_batch(setup.tokenizer, prompts, limit=limit, device=setup.model.device)
            counted = batch["attention_mask"].bool()
            setup.model(**batch, use_cache=False, logits_to_keep=1)
    return {name: count / total for name, count in agreed.items()}


def _shortlisted(layer: RoutedLinear, x: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    assert layer.factors is not None
    first_T1 = layer.route(x).scores_TE.argmax(-1, keepdim=True)
    order_TE = linear(x, layer.factors.own.prototypes_EI).abs().argsort(dim=-1, descending=True)
    return {str(size): (order_TE[..., :size] == first_T1).any(-1) for size in sizes}


def _by_the_whole_factor(layer: RoutedLinear, x: Tensor) -> dict[str, Tensor]:
    parts = layer.stack().parts().values()
    squares_TE = torch.stack([linear(x, part.A).square().sum(-1) for part in parts], dim=-1)
    return {"first": layer.route(x).scores_TE.argmax(-1) == squares_TE.argmax(-1)}


def _added(setup: ExperimentSetup, router: Router) -> float:
    """Operations that routing adds for one token."""
    ids = sample_ids(setup)
    base = forward_flops(setup.model, ids)
    with setup.routed(router):
        return (forward_flops(setup.model, ids) - base) / SAMPLE_TOKENS


def _with_one_A(library: ExpertLibrary, folder: Path) -> ExpertLibrary:
    first: dict[str, Tensor] = {}

    def share(module: str, pair: Pair, _generator: torch.Generator) -> Pair:
        B, A = pair
        shared = first.setdefault(module, A)
        return B, shared if shared.shape == A.shape else A

    for name in library:
        changed_expert(library, name, folder, share)
    return ExpertLibrary.open(folder)
