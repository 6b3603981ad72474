"""Routing against the rank of the experts: libraries of the same tasks' experts, each of one rank."""

from __future__ import annotations

import dataclasses
from typing import Any

from spectr.errors import DataError
from spectr.evaluation.experiments.setup import ExperimentSetup, Result, percent
from spectr.evaluation.expert_recall import over_runs

ROUTERS: list[tuple[str, dict[str, Any]]] = [
    ("arrow", {"top_k": 1}),
    ("spectr", {"top_k": 1}),
    ("spectr-projection", {"top_k": 1}),
    ("calibrated", {}),
]


def ranks(setup: ExperimentSetup) -> Result:
    """How often the right expert is found, by rank, among experts that differ only in rank.

    Source: SpectR, Figure 6.

    Raises:
        DataError: No library of experts of other ranks was given.
    """
    if not setup.ranks:
        raise DataError(
            "there are no experts of other ranks",
            expected="--ranks FOLDER, which holds adapters named EXPERT-rRANK, such as sst2-r16",
            do="train some: spectr train --task sst2 --rank 16 --out runs/ranks/sst2-r16",
        )
    rows, data = [], {}
    for rank, library in sorted(setup.ranks.items()):
        known = library.with_calibration(setup.calibration_of(library, f"ranks: calibrating rank {rank}"))
        among = dataclasses.replace(setup, library=known, seeds=())
        for label, router in among.routers(ROUTERS):
            runs = among.find_over_seeds(router, f"ranks: rank {rank}, {label}")
            tokens, prompts = over_runs(runs, lambda f: f.top_1), over_runs(runs, lambda f: f.place == 1)
            rows.append([rank, label, percent(tokens), percent(prompts)])
            data.setdefault(label, {})[str(rank)] = [tokens.value, tokens.error, prompts.value, prompts.error]
    experts = sorted({name for library in setup.ranks.values() for name in library})
    return Result(
        name="ranks",
        title="Routing against the rank of the experts",
        source="SpectR, Figure 6",
        columns=["rank", "router", "tokens, first", "prompts, by vote"],
        rows=rows,
        data={"routers": data, "chance": 1 / len(experts)},
        notes=[
            f"Libraries of {len(experts)} experts ({', '.join(experts)}) that differ only in rank. "
            f"By chance {1 / len(experts):.1%}. ± one standard error over prompts.",
            *among.left_out(ROUTERS),
        ],
        origin=setup.origin(),
    )
