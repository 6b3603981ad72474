"""Whether PEFT reads an expert as spectr does."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from spectr.errors import some_of

_SHOWN = 3


def peft_remarks(model: Any, targets: Any, modules: Iterable[str]) -> list[str]:
    """Remarks for users who load an expert with PEFT; empty if it adapts the same layers, or is not installed.

    PEFT does not adapt ``out_proj`` in Mamba models, and treats some layers of mixtures of experts as fused parameters.

    Args:
        model: On the meta device; it is left with an adapter.
        targets: The expert's ``target_modules``.
        modules: The layers that it has factors for.
    """
    if find_spec("peft") is None:
        return []
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import LoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what does not match, which this function reports
        try:
            get_peft_model(model, LoraConfig(r=1, target_modules=targets))
        except ValueError as error:
            return [f"PEFT does not load this expert ({str(error).splitlines()[0]}); spectr does."]
    adapted = {name for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    other = sorted(adapted ^ set(modules))
    if not other:
        return []
    return [f"PEFT reads {some_of(other, _SHOWN)} differently: use this expert with spectr only."]
