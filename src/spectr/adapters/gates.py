"""PHATGOOSE gates next to an adapter: one vector per module, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from spectr.adapters.expert import Expert
from spectr.atomic_write import save_readable
from spectr.errors import AdapterError, some_of

GATES_FILE = "gates.safetensors"
_FORMAT = "1"


def read_gates(expert: Expert) -> dict[str, Float[Tensor, " I"]]:
    """The gates of an expert by module, float32; empty if none were trained.

    Raises:
        AdapterError: The file is damaged, or lacks a finite vector of the right size for some module.
    """
    path = expert.weights.parent / GATES_FILE
    if not path.is_file():
        return {}
    names = {old: module for module, old in expert.file_names.items()}
    try:
        with safe_open(path, framework="pt") as file:
            keys: list[str] = list(file.keys())
            found = {names.get(key, key): file.get_tensor(key).float() for key in keys}
    except Exception as error:  # safetensors raises its own types, and OSError
        raise _damaged(expert, f"{path} cannot be read as safetensors ({error})") from error
    wrong = sorted(set(expert.shapes) ^ set(found))
    wrong += [
        module
        for module, shape in expert.shapes.items()
        if module in found and (found[module].shape != (shape.inputs,) or not torch.isfinite(found[module]).all())
    ]
    if wrong:
        raise _damaged(expert, f"{path} does not fit the adapter at {some_of(wrong, 3)}")
    return found


def has_gates(expert: Expert) -> bool:
    """Whether the expert's folder has gates."""
    return (expert.weights.parent / GATES_FILE).is_file()


def write_gates(path: Path, gates: Mapping[str, Float[Tensor, " I"]], facts: Mapping[str, Any]) -> None:
    """Write gates in bfloat16; ``facts`` (JSON) in the file's header record how they were trained."""
    tensors = {module: gate.detach().to(torch.bfloat16).contiguous().cpu() for module, gate in sorted(gates.items())}
    save_readable(tensors, path, {"format": _FORMAT, "facts": json.dumps(dict(facts), sort_keys=True)})


def _damaged(expert: Expert, what: str) -> AdapterError:
    return AdapterError(
        f"expert '{expert.name}': {what}",
        expected="for each module of the adapter, one finite vector of the size of the module's input",
        do=f"delete it and train the gates again: spectr train gates {expert.name}",
    )
