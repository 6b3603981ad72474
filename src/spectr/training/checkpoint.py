"""Checkpoints of a training run: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spectr.errors import DataError

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    facts: dict[str, Any],
) -> None:
    """Write parameters, AdamW's moments and the best epoch's weights; ``facts`` (JSON) goes into the header."""
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
    for name, parameter in parameters.items():
        for moment in _MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, scratch, metadata={"facts": json.dumps(facts)})
    os.replace(scratch, path)


def read_facts(path: Path, fingerprint: str | None = None) -> dict[str, Any] | None:
    """The checkpoint's facts, or ``None`` where there is no checkpoint; without a fingerprint of any run.

    Raises:
        DataError: The checkpoint belongs to a run with other settings, data or base model.
    """
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    if fingerprint is not None and facts["fingerprint"] != fingerprint:
        raise DataError(
            f"{path} is the checkpoint of a run with other settings, data or base model",
            expected="the same settings, to go on with that run",
            do="give the same settings again, choose another --out, or delete the checkpoint",
        )
    return facts


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> dict[str, Tensor]:
    """Put a checkpoint's tensors into the parameters and the optimiser; returns the best epoch's weights, if any."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"parameter/{name}"))
            moments: dict[str, Tensor] = {
                moment: file.get_tensor(f"{moment}/{name}").to(parameter.device) for moment in _MOMENTS
            }
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        names = [key for key in list(file.keys()) if key.startswith("best/")]
        return {name.removeprefix("best/"): file.get_tensor(name) for name in names}
