"""Similarity of experts, pairwise and over depth."""

from __future__ import annotations

import re

import torch

from spectr.evaluation.experiments.base import Bench, Result
from spectr.evaluation.similarity import cosines, mean_cosines

_BLOCK = re.compile(r"\.(\d+)\.")


def similarity(bench: Bench) -> Result:
    """Cosine between the experts' updates, averaged over modules; and by layer and kind of module.

    Source: SpectR, Figures 2, 3 and 7.
    """
    by_module = cosines(bench.library, lambda done, total: bench.progress("similarity", done, total, ""))
    mean_EE = mean_cosines(by_module)
    names = bench.library.names
    off = ~torch.eye(len(names), dtype=torch.bool)
    kinds: dict[str, dict[int, list[float]]] = {}
    for module, table_EE in by_module.items():
        block = _BLOCK.search(module)
        values = table_EE[off]
        kinds.setdefault(module.rpartition(".")[2], {}).setdefault(int(block[1]) if block else -1, []).append(
            float(values.nanmean())
        )
    rows = [[name, *(f"{value:.3f}" for value in row)] for name, row in zip(names, mean_EE.tolist(), strict=True)]
    return Result(
        name="similarity",
        title="How alike the experts are",
        source="SpectR, Figures 2, 3 and 7",
        columns=["expert", *names],
        rows=rows,
        data={
            "experts": list(names),
            "mean": mean_EE.tolist(),
            "by_kind": {
                kind: {str(block): sum(values) / len(values) for block, values in sorted(blocks.items())}
                for kind, blocks in kinds.items()
            },
        },
        notes=[
            "Cosine of the updates c B A as vectors, mean over the modules that both experts adapt; computed from the "
            "factors.",
            f"Mean over all pairs: {float(mean_EE[off].nanmean()):.4f}.",
        ],
        origin=bench.origin(),
    )
