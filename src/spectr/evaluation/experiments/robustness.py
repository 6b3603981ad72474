"""Unusual experts: does an expert that is large, of high rank or random attract prompts of other experts."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectr.adapters.config import CONFIG_FILE, DEFAULTS
from spectr.calibration import calibrate
from spectr.evaluation.experiments.setup import ExperimentSetup, Result, percent
from spectr.evaluation.expert_recall import over_runs
from spectr.library import ExpertLibrary

ROUTERS: list[tuple[str, dict[str, Any]]] = [("arrow", {"top_k": 4}), ("spectr", {"top_k": 4}), ("calibrated", {})]
_LARGE, _RANK = 100.0, 64


def robustness(setup: ExperimentSetup) -> Result:
    """Routing if an expert is scaled by a hundred, has rank 64, or a random expert is added.

    Also if an expert is replaced by each of the setup's substitutes, such as one that was trained for longer.
    """
    rows, data, odd = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for case, name, source in [*setup.substitutes, *_made_cases(setup.library, Path(folder))]:
            library = setup.library.without(name) if name in setup.library else setup.library
            library = library.with_expert(name, source)
            if setup.library.calibration is not None:
                library = library.with_calibration(calibrate(setup.model, library, setup.tokenizer))
            changed = dataclasses.replace(setup, library=library, seeds=())
            odd[case] = name
            for label, router in changed.routers(ROUTERS):
                runs = changed.find_over_seeds(router, f"{case}: {label}")
                found = over_runs(runs, lambda finding: finding.place == 1)
                others = [task for task in runs[0] if setup.expert_of(task) != name]
                taken = over_runs(runs, lambda finding, name=name: finding.winner == name, others)
                mine = [task for task in runs[0] if setup.expert_of(task) == name]
                kept = over_runs(runs, lambda finding: finding.place == 1, mine) if mine else None
                rows.append([case, label, percent(found), percent(kept) if kept else "", percent(taken)])
                data.setdefault(case, {})[label] = {
                    "found": found.value,
                    "stolen": taken.value,
                    "own": kept.value if kept else None,
                }
    return Result(
        name="robustness",
        title="Unusual experts",
        source="ours",
        columns=["library", "router", "prompts, by vote", "its own prompts", "prompts of others that it took"],
        rows=rows,
        data={"cases": data, "odd": odd},
        notes=[
            "One expert of the library is changed or added. ± one standard error over prompts.",
            *setup.left_out(ROUTERS),
            *setup.remarks(),
        ],
        origin=setup.origin(),
    )


def _larger(tensors: dict[str, Tensor], config: dict) -> None:
    config["lora_alpha"] *= _LARGE


def _higher_rank(tensors: dict[str, Tensor], config: dict) -> None:
    """The same update in factors of rank 64, rotated into all their directions, at the same scale."""
    generator, rank = torch.Generator().manual_seed(0), config["r"]
    for key in [key for key in tensors if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        Q, _ = torch.linalg.qr(torch.randn(_RANK, rank, generator=generator, dtype=torch.float32))
        tensors[key], tensors[other] = Q @ tensors[key].float(), tensors[other].float() @ Q.T
    config["lora_alpha"] *= _RANK / rank
    config["r"] = _RANK


def _random(tensors: dict[str, Tensor], config: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    for key, tensor in tensors.items():
        tensors[key] = torch.randn(tensor.shape, generator=generator, dtype=torch.float32) * tensor.float().std()


_CASES: dict[str, Callable[[dict[str, Tensor], dict], None]] = {
    "NAME a hundred times as large": _larger,
    "NAME, the same update in factors of rank 64": _higher_rank,
    "a random expert": _random,
}


def _made_cases(library: ExpertLibrary, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Each of :data:`_CASES` with the name of the expert that it gives, and its folder."""
    first = library.names[0]
    for number, (case, change) in enumerate(_CASES.items()):
        name = "random" if change is _random else first
        yield case.replace("NAME", first), name, changed_expert(library, first, folder / str(number), change)


def changed_expert(
    library: ExpertLibrary, name: str, folder: Path, change: Callable[[dict[str, Tensor], dict], None]
) -> Path:
    """A copy of an expert in ``folder/NAME`` whose tensors and configuration ``change`` has altered."""
    weights = library[name].weights
    tensors, config = load_file(weights), {**DEFAULTS, **json.loads((weights.parent / CONFIG_FILE).read_text())}
    change(tensors, config)
    target = folder / name
    target.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / weights.name)
    (target / CONFIG_FILE).write_text(json.dumps(config))
    return target
