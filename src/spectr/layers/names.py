"""A layer that stands in for another keeps the other's names in ``state_dict``."""

from __future__ import annotations

from typing import Any

from torch import nn


def take_names_of_base(module: nn.Module) -> None:
    """Have ``module.base`` saved and loaded under the names that it would have in the module's place."""
    module.register_state_dict_post_hook(_without_base)
    module.register_load_state_dict_pre_hook(_with_base)


def _without_base(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    inner = prefix + "base."
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _with_base(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(prefix + "base.")]:
        state[prefix + "base." + key.removeprefix(prefix)] = state.pop(key)
