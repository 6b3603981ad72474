"""Prompts that contain two tasks: are both experts found, and which one is used."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch

from spectr.evaluation.experiments.setup import ExperimentSetup, Result, percent
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
def mixed(setup: ExperimentSetup) -> Result:
    """One prompt for every pair of tasks, one question after the other.

    Both experts are found if they have the two largest weights over the whole prompt.
    """
    tasks = setup.owned
    pairs = [pair[:: (-1) ** number] for number, pair in enumerate(combinations(tasks, 2))]  # both orders in turn
    prompts = {(a, b): f"{tasks[a][1][0].prompt}\n\n{tasks[b][1][-1].prompt}" for a, b in pairs}
    rows, data = [], {}
    for label, router in setup.routers(ROUTERS):
        found = []
        with setup.routed(router) as routed:
            for done, ((a, b), prompt) in enumerate(prompts.items(), start=1):
                batch = encode_batch(setup.tokenizer, [prompt], device=setup.model.device)
                with trace(setup.model) as record:
                    setup.model(**batch, use_cache=False, logits_to_keep=1)
                mean_E = record.weights()[0, setup.opening :].mean(0)
                right = {routed.experts.index(setup.expert_of(task)) for task in (a, b)}
                hits = len(right & set(mean_E.topk(2).indices.tolist()))
                found.append((float(hits == len(right)), float(hits >= 1), float(mean_E[sorted(right)].sum())))
                setup.progress(f"mixed: {label}", done, len(prompts), "")
        measured = [Measurement.of(values) for values in zip(*found, strict=True)]
        rows.append([label, *map(percent, measured)])
        data[label] = [[m.value, m.error] for m in measured]
    return Result(
        name="mixed",
        title="Prompts with two tasks",
        source="ours",
        columns=["router", "both experts are the first two", "one of them is", "their share of the work"],
        rows=rows,
        data={"routers": data, "chance": 2 / (len(setup.library) * (len(setup.library) - 1))},
        notes=[
            f"{len(prompts)} prompts: every pair of tasks, one question after the other. Counted are the two experts "
            "with the largest weight over all tokens after the template's opening and all layers. ± one standard "
            "error over prompts.",
            *setup.left_out(ROUTERS),
        ],
        origin=setup.origin(),
    )
