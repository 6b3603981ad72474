"""What each token's experts are, on one prompt of a task."""

from __future__ import annotations

from typing import Any

import torch

from spectr.evaluation.experiments.base import Bench, Result
from spectr.evaluation.experiments.compared import routers_that_fit, unfit_in_words
from spectr.layers import trace
from spectr.models import encode_batch

ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("arrow", {"top_k": 4}),
    ("spectr", {"top_k": 4}),
    ("calibrated-token", {"top_k": 1}),
    ("calibrated", {}),
]


@torch.inference_mode()
def tokens(bench: Bench) -> Result:
    """For one prompt, the mean weight of every expert at every token, router by router.

    Source: SpectR, Figure 4.
    """
    task, (_, examples) = next(iter(bench.owned.items()))
    example = min(examples, key=lambda one: len(one.prompt))
    batch = {
        key: value.to(bench.model.device) for key, value in encode_batch(bench.tokenizer, [example.prompt]).items()
    }
    pieces = [bench.tokenizer.decode([token]) for token in batch["input_ids"][0].tolist()][bench.opening :]
    rows, weights, expert = [], {}, bench.expert_of(task)
    for label, router in routers_that_fit(ROUTERS, bench):
        with bench.routed(router) as routed, trace(bench.model) as record:
            bench.model(**batch, use_cache=False, logits_to_keep=1)
            names = routed.experts
        weight_TE = record.weights()[0, bench.opening :]
        weights[label] = [[round(value, 4) for value in row] for row in weight_TE.tolist()]
        mean_E = weight_TE.mean(0)
        first = int(mean_E.argmax())
        rows.append([label, f"{float(mean_E[names.index(expert)]):.1%}", f"{names[first]} {float(mean_E[first]):.1%}"])
        bench.progress("tokens", len(rows), len(ROUTERS), label)
    return Result(
        name="tokens",
        title="Who works on which token",
        source="SpectR, Figure 4",
        columns=["router", f"share of {expert}, the right one", "largest share"],
        rows=rows,
        data={"task": task, "tokens": pieces, "experts": list(bench.library.names), "weights": weights},
        notes=[
            f"The shortest of the prompts of {task}. Colour: the expert with the largest weight at a token, averaged "
            "over all layers; the stronger, the larger that weight.",
            *unfit_in_words(ROUTERS, bench),
        ],
        origin=bench.origin(),
    )
