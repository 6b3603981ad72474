"""The experts of each token, for one prompt of a task."""

from __future__ import annotations

from typing import Any

import torch

from spectr.evaluation.experiments.setup import ExperimentSetup, Result
from spectr.layers import trace
from spectr.models import encode_batch

ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("arrow", {"top_k": 4}),
    ("spectr", {"top_k": 4}),
    ("calibrated-token", {"top_k": 1}),
    ("calibrated", {}),
]


@torch.inference_mode()
def tokens(setup: ExperimentSetup) -> Result:
    """For one prompt, the mean weight of every expert at every token, router by router.

    Source: SpectR, Figure 4.
    """
    task, (_, examples) = next(iter(setup.owned.items()))
    example = min(examples, key=lambda one: len(one.prompt))
    batch = encode_batch(setup.tokenizer, [example.prompt], device=setup.model.device)
    pieces = [setup.tokenizer.decode([token]) for token in batch["input_ids"][0].tolist()][setup.opening :]
    rows, weights, scores, expert = [], {}, {}, setup.expert_of(task)
    for label, router in setup.routers(ROUTERS):
        with setup.routed(router) as routed, trace(setup.model) as record:
            setup.model(**batch, use_cache=False, logits_to_keep=1)
            names = routed.experts
        weight_TE = record.weights()[0, setup.opening :]
        weights[label] = [[round(value, 4) for value in row] for row in weight_TE.tolist()]
        if routed.policy is None:
            score_TE = record.mean_scores()[0, setup.opening :]
            scores[label] = [[round(value, 4) for value in row] for row in score_TE.tolist()]
        mean_E = weight_TE.mean(0)
        first = int(mean_E.argmax())
        rows.append([label, f"{float(mean_E[names.index(expert)]):.1%}", f"{names[first]} {float(mean_E[first]):.1%}"])
        setup.progress("tokens", len(rows), len(ROUTERS), label)
    return Result(
        name="tokens",
        title="The experts of each token",
        source="SpectR, Figure 4",
        columns=["router", f"share of {expert}, the right one", "largest share"],
        rows=rows,
        data={
            "task": task,
            "tokens": pieces,
            "experts": list(setup.library.names),
            "weights": weights,
            "scores": scores,
        },
        notes=[
            f"The shortest prompt of {task}. Colour: the expert with the largest weight at a token, averaged over all "
            "layers; stronger colours are larger weights. Under 'scores': the expert with the largest mean score over "
            "all modules, as the paper draws it. Modules with large scores count more there.",
            *setup.left_out(ROUTERS),
        ],
        origin=setup.origin(),
    )
