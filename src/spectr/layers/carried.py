"""PEFT adapters that a model already carries; experts would be added to them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from spectr.errors import CompositionError, some_of


def check_bare(model: nn.Module) -> None:
    """Check that a model carries no PEFT adapters.

    Raises:
        CompositionError: It carries adapters, enabled or not.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:  # without an import of PEFT no layer is PEFT's
        return
    wrapped = getattr(sys.modules.get("peft"), "PeftModel", ())
    whole = isinstance(model, wrapped)
    names: set[str] = {*getattr(model, "peft_config", ())} if whole else set()
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if isinstance(layer, tuners.BaseTunerLayer):
            names |= {*_adapters(layer), *layer.merged_adapters}
    if names:
        raise CompositionError(
            f"this model already carries PEFT adapters ({some_of(sorted(names), 3)}); experts would be added to them",
            expected="a plain base model",
            do=_cure(model, whole, sorted(names)),
        )


def _adapters(layer: Any) -> set[str]:
    """Names of the adapters that one layer of PEFT holds."""
    return {name for part in layer.adapter_layer_names for name in getattr(layer, part, {})}


def _cure(model: nn.Module, whole: bool, names: list[str]) -> str:
    if whole or not getattr(model, "_hf_peft_config_loaded", False):
        which = "model" if whole else "the PeftModel around it"
        return f"{which}.unload() returns the base model; merge_and_unload() keeps the adapters in its weights"
    listed = ", ".join(map(repr, names))
    return (
        f"model.delete_adapter([{listed}]) unloads them; to route them, load the base model that they were trained on "
        "and add them to the library"
    )
