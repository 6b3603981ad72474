"""What routing costs: storage, memory and arithmetic, by the formula, by section 5, and as measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectr.adapters import Expert
from spectr.composition import Routed
from spectr.evaluation.experiments.setup import ExperimentSetup, Result, SideTable
from spectr.flops import count_flops, forward_flops
from spectr.layers import RoutedLinear
from spectr.layers.batch_routing import BatchRouting, LayerCall, routed_by

COLUMNS = (
    "scores, MFLOP a token",
    "update, factors merged",
    "update, outputs",
    "stored, MB",
)
_BYTES = 2  # of a number in bfloat16


class Count(NamedTuple):
    """Of one method, over all modules: operations a token (a multiply-add counts as 2), and bytes.

    Attributes:
        scores: To score the experts.
        merged: To apply what the chosen experts' merged factors give.
        outputs: To apply each chosen expert, and add.
        stored: Experts and what scores them.
    """

    scores: float
    merged: float
    outputs: float
    stored: float


def by_method(experts: Sequence[Expert]) -> dict[str, Count]:
    """Arrow and SpectR with four experts a token, and mu, from the sizes of the experts; of unequal ranks their mean.

    Source: SpectR (Fleshman and Van Durme, 2025), section 5.
    """
    totals = {name: [0.0] * 4 for name in ("arrow", "spectr", "mu, folded into W", "mu, factors merged")}
    for module in {module for expert in experts for module in expert.shapes}:
        shapes = [expert.shapes[module] for expert in experts if module in expert.shapes]
        count, taken = len(shapes), min(4, len(shapes))
        rank = sum(shape.rank for shape in shapes) / count
        inputs, outputs = shapes[0].inputs, shapes[0].outputs
        into, out, adapters = 2 * rank * inputs, 2 * rank * outputs, _BYTES * count * rank * (inputs + outputs)
        for name, counted in {
            "arrow": (2 * count * inputs, into + out, taken * (into + out), adapters + _BYTES * count * inputs),
            "spectr": (count * into, out, taken * out, adapters),
            "mu, folded into W": (0, 0, 0, 0),
            "mu, factors merged": (0, into + out, into + out, adapters / count),
        }.items():
            totals[name] = [total + value for total, value in zip(totals[name], counted, strict=True)]
    return {name: Count(*values) for name, values in totals.items()}


ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("arrow", {"top_k": 4}),
    ("spectr", {"top_k": 4}),
    ("lag", {"shortlist": 3, "top_k": 1}),
    ("phatgoose", {}),
    ("glider", {}),
    ("mu", {}),
    ("calibrated-prior", {"top_k": 1}),
    ("calibrated", {}),
]
SAMPLE_TOKENS = 64


@torch.inference_mode()
def costs(setup: ExperimentSetup) -> Result:
    """Storage of the library, memory and multiply-adds that each router adds for one token.

    Source: SpectR, section 5.
    """
    experts = [setup.library[name] for name in setup.library]
    stored = sum(expert.weights.stat().st_size for expert in experts)
    read = int(setup.library.calibration.real.sum()) if setup.library.calibration else 0
    ids = sample_ids(setup)
    base = forward_flops(setup.model, ids)
    plain = sum(p.numel() * p.element_size() for p in setup.model.parameters())
    rows = [["base model", f"{plain / 1e6:.1f}", "", f"{base / SAMPLE_TOKENS / 1e6:.1f}", "", ""]]
    data = {}
    for done, (label, router) in enumerate(setup.routers(ROUTERS), start=1):
        with setup.routed(router) as routed:
            data[label] = row = _measured(routed, ids, base)
        memory, formula, flops, probe = (row[key] / 1e6 for key in ("memory", "formula", "flops", "probe"))
        share = row["flops"] * SAMPLE_TOKENS / base
        cells = [f"{memory:.1f}", f"{formula:.2f}", f"{flops:.2f}", f"{share:.1%}", f"{probe:.1f}" if probe else ""]
        rows.append([label, *cells])
        setup.progress("costs", done, len(ROUTERS), label)
    counted = by_method(experts)
    return Result(
        name="costs",
        title="What routing costs",
        source="SpectR, section 5",
        columns=[
            "model",
            "memory, MB (routed: added)",
            "added by formula, MFLOP a token",
            "measured, MFLOP a token",
            "of the base model",
            "once a prompt, MFLOP by its token",
        ],
        rows=rows,
        data={
            "stored": stored,
            "base": base / SAMPLE_TOKENS,
            "routers": data,
            "memory": plain,
            "section_5": {name: count._asdict() for name, count in counted.items()},
        },
        more=[
            SideTable(
                title="As section 5 counts, 4 experts a token",
                columns=["method", *COLUMNS],
                rows=[[name, *(f"{value / 1e6:.2f}" for value in count)] for name, count in counted.items()],
            )
        ],
        notes=[
            f"The library takes {stored / 1e6:.1f} MB on disk for {len(experts)} experts.",
            _FORMULA_NOTE,
            _SECTION_5_NOTE,
            f"Once a prompt: work before the answer, per token of a prompt of {SAMPLE_TOKENS} tokens: the probe of the "
            "calibrated routers, and GLIDER's instruction, which the base model writes whatever the prompt's length "
            "(its embedding, by another model, is not counted). Before a model's first prompt, the calibrated routers "
            "also read the calibration's texts once, "
            f"{read} tokens here.",
            *setup.left_out(ROUTERS),
        ],
        origin=setup.origin(),
    )


_FORMULA_NOTE = (
    "Formula: 2 P I for all scores and 2 O P for the updates of a module with I inputs, O outputs and P ranks "
    "in total (products of experts that were not chosen are computed, with the weight zero). 2 O R for each "
    "chosen expert if only these are summed, which happens if at most a fourth of equal-rank experts is chosen. "
    "Prototypes add 2 E I; unequal ranks add 4 P E, or 2 P E if h is not scored. "
    "Held weights: only the chosen experts' P. "
    "LAG: 2 E I, plus 2 R I for each expert on its shortlist and 2 R O for each chosen expert. "
    "One multiply-add counts as 2. The base model's measurement includes attention."
)


_SECTION_5_NOTE = (
    "As section 5 counts: Arrow's scores are 2 E I for a module, 1 / R of SpectR's 2 E R I, which give A* x along. "
    "Factors merged: one adapter is applied, 2 R I + 2 R O, and SpectR has its first part. Outputs: k of them. mu is "
    "part of W where it is folded in, and one adapter where factors are merged. Stored in bfloat16: the adapters, and "
    "Arrow's prototypes. What is executed here is in the first table: the dispatcher makes all products where that is "
    "faster."
)


def _measured(routed: Routed, ids: Tensor, base: int) -> dict[str, Any]:
    """Bytes that the layers hold, and operations a token: added, by the formula, and once a prompt."""
    layers, prompt = routed.layers, routed.prompt
    memory = sum(b.numel() * b.element_size() for layer in layers.values() for b in layer.buffers(recurse=False))
    probe, routing = 0, BatchRouting()
    if prompt:
        prompt.decide(input_ids=ids.roll(1, dims=1))  # the first prompt has work of its own
        probe = count_flops(lambda: prompt.decide(input_ids=ids))
        routing = prompt.routing(prompt.decide(input_ids=ids))
    with routed_by(routing):
        added = forward_flops(routed.model, ids) - base
    formula = sum(_formula(layer, routing.of(layer)) for layer in layers.values())
    return {"memory": memory, "flops": added / SAMPLE_TOKENS, "formula": formula, "probe": probe / SAMPLE_TOKENS}


def sample_ids(setup: ExperimentSetup) -> Tensor:
    """Tokens to count operations on, (1, SAMPLE_TOKENS)."""
    words = setup.model.config.get_text_config().vocab_size
    return torch.arange(SAMPLE_TOKENS, device=setup.model.device)[None] % words


def _formula(layer: RoutedLinear, call: LayerCall) -> int:
    factors = call.factors
    if factors is None:
        return 0
    if layer.lister is not None:
        scored, taken = layer.lister.shortlist, layer.select.k or len(layer.experts)
        count, rank = len(layer.experts), len(factors.owner_P) / len(layer.experts)  # of unequal ranks their mean
        chosen = rank * (min(scored, count) * layer.in_features + min(taken, count) * layer.out_features)
        return round(2 * (count * layer.in_features + chosen))
    if call.fixed is not None:
        return 2 * (factors.A_PI.numel() + factors.B_OP.numel())
    prototypes = sum(own.numel() for own in factors.own if own.ndim == 2)
    sums = 2 if "h" in layer.router.reads else 1  # by expert: lengths of h, where these are the scores, and outputs
    summing = 0 if factors.common_rank else sums * len(factors.A_PI) * len(factors.experts)
    gathers = factors.rows_ER is not None
    taken = layer.select.k / len(factors.experts) if gathers and layer.select.k else 1
    return round(2 * (factors.A_PI.numel() + taken * factors.B_OP.numel() + prototypes + summing))
