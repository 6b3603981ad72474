"""Names that different versions of transformers give to the same modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import nn

from spectr.adapters.naming import Naming
from spectr.composition.parameter_names import ModelParameters, renamings, transforms_of
from spectr.layers.carried import check_bare

Rename = Callable[[str], str]
_SUFFIX = ".lora_A.weight"  # patterns may match the text after a module's name


def naming_of(model: nn.Module) -> Naming:
    """The names of a model's modules, with transformers' renamings for older checkpoints.

    Raises:
        CompositionError: The model already carries adapters.

    Source: ``transformers.conversion_mapping``, and ``_checkpoint_conversion_mapping`` of version 4.
    """
    check_bare(model)
    modules = dict(model.named_modules())
    return Naming(
        modules=frozenset(modules),
        renamed=_Renamed(model),
        heads=_heads(model, modules),
        parameters=ModelParameters(model),
    )


class _Renamed:
    """Maps an older module name to the current one; the rules are built when a name is not the model's."""

    def __init__(self, model: nn.Module):
        self._model = model

    @cached_property
    def _rules(self) -> list[Rename]:
        return _rules(self._model)

    def __call__(self, module: str) -> str:
        key = module + _SUFFIX
        for rule in self._rules:
            key = rule(key)
        new = key.removesuffix(_SUFFIX)
        return module if module.endswith(new) else new  # like PEFT: a name that lost only its prefix is unchanged

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which create their own rules."""
        return {"_model": self._model}


def _rules(model: Any) -> list[Rename]:
    older = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    return [_first_of(older)] if older else renamings(transforms_of(model))


def _first_of(mapping: dict[str, str]) -> Rename:
    """Replace the first pattern that matches a key, as transformers 4 did."""

    def rule(key: str) -> str:
        for pattern, replacement in mapping.items():
            text = re.sub(r"\(.*\)", "", replacement.lstrip("^"))
            key, count = re.subn(pattern, text, key)
            if count:
                break
        return key

    return rule


def _heads(model: Any, modules: dict[str, nn.Module]) -> frozenset[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return frozenset(name for name, module in modules.items() if head is not None and module is head)
