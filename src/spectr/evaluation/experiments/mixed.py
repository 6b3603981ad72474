"""Prompts that ask two things at once: are both experts found, and who does the work."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch

from spectr.evaluation.experiments.base import Bench, Result, percent
from spectr.evaluation.experiments.compared import routers_that_fit, unfit_in_words
from spectr.evaluation.score import Measurement
from spectr.layers import trace
from spectr.models import encode_batch

ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("arrow", {"top_k": 4}),
    ("spectr", {"top_k": 4}),
    ("calibrated-prior", {"top_k": 1}),
    ("calibrated", {"top_k": 2}),
]


@torch.inference_mode()
def mixed(bench: Bench) -> Result:
    """One prompt for every pair of tasks, one question after the other.

    Found are both experts where they are the two with the largest weights over the whole prompt.
    """
    tasks = bench.owned
    pairs = [pair[:: (-1) ** number] for number, pair in enumerate(combinations(tasks, 2))]  # both orders in turn
    prompts = {(a, b): f"{tasks[a][1][0].prompt}\n\n{tasks[b][1][-1].prompt}" for a, b in pairs}
    rows, data = [], {}
    for label, router in routers_that_fit(ROUTERS, bench):
        both, one, shares = [], [], []
        with bench.routed(router) as routed:
            for done, ((a, b), prompt) in enumerate(prompts.items(), start=1):
                batch = encode_batch(bench.tokenizer, [prompt])
                batch = {key: value.to(bench.model.device) for key, value in batch.items()}
                with trace(bench.model) as record:
                    bench.model(**batch, use_cache=False, logits_to_keep=1)
                mean_E = record.weights()[0, bench.opening :].mean(0)
                right = {routed.experts.index(bench.expert_of(task)) for task in (a, b)}
                hits = len(right & set(mean_E.topk(2).indices.tolist()))
                both.append(float(hits == len(right)))
                one.append(float(hits >= 1))
                shares.append(float(mean_E[sorted(right)].sum()))
                bench.progress(f"mixed: {label}", done, len(prompts), "")
        measured = [Measurement.of(values) for values in (both, one, shares)]
        rows.append([label, *map(percent, measured)])
        data[label] = [[m.value, m.error] for m in measured]
    return Result(
        name="mixed",
        title="Prompts that ask two things at once",
        source="ours",
        columns=["router", "both experts are the first two", "one of them is", "their share of the work"],
        rows=rows,
        data={"routers": data, "chance": 2 / (len(bench.library) * (len(bench.library) - 1))},
        notes=[
            f"{len(prompts)} prompts: every pair of tasks, one question after the other. The two "
            "experts with the largest weight over all tokens after the template's opening and all layers. ± one "
            "standard error over prompts.",
            *unfit_in_words(ROUTERS, bench),
        ],
        origin=bench.origin(),
    )
