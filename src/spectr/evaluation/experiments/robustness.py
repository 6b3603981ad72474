"""Odd companions: does an expert that is large, of high rank, or random take prompts that are not its own."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectr.calibration import calibrate
from spectr.evaluation.experiments.base import Bench, Result, percent, routers_that_fit
from spectr.evaluation.score import Measurement
from spectr.library import ExpertLibrary

ROUTERS = [("arrow", {"top_k": 4}), ("spectr", {"top_k": 4}), ("calibrated", {})]
_LARGE, _RANK = 100.0, 64


def robustness(bench: Bench) -> Result:
    """Routing where the first expert is made a hundred times as large, or has rank 64, or a random one is added."""
    rows, data = [], {}
    first = bench.library.names[0]
    for case, change in _CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            name = "random" if case == "a random expert" else first
            source = _changed(bench.library, first, Path(folder), change)
            library = bench.library if name == "random" else bench.library.without(first)
            library = library.with_expert(name, source)
            if bench.library.calibration is not None:
                library = library.with_calibration(calibrate(bench.model, library, bench.tokenizer))
            changed = dataclasses.replace(bench, library=library)
            for label, router in routers_that_fit(ROUTERS, changed):
                with changed.routed(router) as routed:
                    findings = changed.find(routed, f"{case.replace('NAME', first)}: {label}")
                others = {task: some for task, some in findings.items() if bench.expert_of(task) != name}
                found = Measurement.of([float(f.place == 1) for some in findings.values() for f in some])
                taken = Measurement.of([float(f.winner == name) for some in others.values() for f in some])
                rows.append([case.replace("NAME", first), label, percent(found), percent(taken)])
                data.setdefault(case, {})[label] = {"found": found.value, "stolen": taken.value}
    return Result(
        name="robustness",
        title="Odd companions",
        source="ours",
        columns=["library", "router", "prompts, by vote", "prompts of others that it took"],
        rows=rows,
        data={"cases": data, "expert": first},
        notes=["One expert of the library is changed, or one is added. ± one standard error over prompts."],
        origin=bench.origin(),
    )


def _larger(tensors: dict[str, Tensor], config: dict) -> None:
    config["lora_alpha"] *= _LARGE


def _higher_rank(tensors: dict[str, Tensor], config: dict) -> None:
    """The same update in factors of rank 64: rotated into all directions of them, the scale kept."""
    generator, rank = torch.Generator().manual_seed(0), config["r"]
    for key in [key for key in tensors if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        Q, _ = torch.linalg.qr(torch.randn(_RANK, rank, generator=generator))
        tensors[key], tensors[other] = Q @ tensors[key].float(), tensors[other].float() @ Q.T
    config["lora_alpha"] *= _RANK / rank
    config["r"] = _RANK


def _random(tensors: dict[str, Tensor], config: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    for key, tensor in tensors.items():
        tensors[key] = torch.randn(tensor.shape, generator=generator) * tensor.float().std()


_CASES: dict[str, Callable[[dict[str, Tensor], dict], None]] = {
    "NAME a hundred times as large": _larger,
    "NAME in factors of rank 64": _higher_rank,
    "a random expert": _random,
}


def _changed(
    library: ExpertLibrary, name: str, folder: Path, change: Callable[[dict[str, Tensor], dict], None]
) -> Path:
    weights = library[name].weights
    tensors, config = load_file(weights), json.loads((weights.parent / "adapter_config.json").read_text())
    change(tensors, config)
    target = folder / name
    target.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / weights.name)
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target
