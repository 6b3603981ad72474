"""Which of a model's parameters are weights of linear layers, from transformers, without any memory for weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from spectr.errors import MissingExtraError, ModelError
from spectr.layers.linear import features


class Linear(NamedTuple):
    """A linear layer whose weight can be adapted; ``transposed`` where it is stored as (inputs, outputs)."""

    module: str
    outputs: int
    inputs: int
    transposed: bool

    @property
    def stored(self) -> tuple[int, int]:
        """The shape of its weight."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a configuration makes of a model.

    Attributes:
        model_type: As in ``config.json``.
        linear: Linear layers by the name of their weight.
        kinds: What the other parameters are, by name: "embedding", "norm", "bias", ...
        tied: Names of parameters that are another one's too, with that one's name.
        modules: Names of all modules.
        prefix: Of the model without its head, with a dot: checkpoints may lack it.
    """

    model_type: str
    linear: Mapping[str, Linear]
    kinds: Mapping[str, str]
    tied: Mapping[str, str]
    modules: tuple[str, ...]
    prefix: str

    def place(self, key: str) -> str:
        """The parameter that a tensor in a checkpoint is, or its own name where it is none."""
        known = self.linear.keys() | self.kinds.keys()
        options = (key, self.prefix + key, key.removeprefix(self.prefix))
        return next((name for name in options if name in known), key)


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a causal language model, built on the ``meta`` device.

    Raises:
        ModelError: transformers cannot build a causal language model from the folder's ``config.json``.
        MissingExtraError: transformers is not installed.
    """
    model = _on_meta(folder)
    names: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {name: first for name, p in parameters.items() if (first := names.setdefault(id(p), name)) != name}
    linear = {
        f"{name}.weight": found
        for name, module in model.named_modules()
        if (found := _linear(name, module)) and f"{name}.weight" not in {*tied, *tied.values()}
    }
    owners = dict(model.named_modules())
    kinds = {name: _kind(name, owners[name.rpartition(".")[0]], tied) for name in parameters if name not in linear}
    prefix = getattr(model, "base_model_prefix", "")
    return Architecture(
        model_type=model.config.model_type,
        linear=linear,
        kinds=kinds,
        tied=tied,
        modules=tuple(name for name in owners if name),
        prefix=f"{prefix}." if prefix else "",
    )


def _on_meta(folder: Path):
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtraError("extracting experts", "models") from error
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"transformers builds no causal language model from {folder / 'config.json'}: {str(error).splitlines()[0]}",
            expected="a decoder that AutoModelForCausalLM knows, without code of its own",
            do="check the folder, or update transformers",
        ) from error


def _linear(name: str, module: nn.Module) -> Linear | None:
    sizes, weight = features(module), getattr(module, "weight", None)
    transposed = type(module).__name__ == "Conv1D"
    if sizes is None or not isinstance(weight, nn.Parameter) or not (transposed or isinstance(module, nn.Linear)):
        return None
    return Linear(name, sizes.outputs, sizes.inputs, transposed)


def _kind(name: str, owner: nn.Module, tied: Mapping[str, str]) -> str:
    others = [other for other, first in tied.items() if first == name]
    others += [tied[name]] if name in tied else []
    tie = f", tied to {', '.join(others)}" if others else ""
    if name.endswith("bias"):
        return f"bias{tie}"
    if isinstance(owner, nn.Embedding):
        return f"embedding{tie}"
    if "norm" in type(owner).__name__.lower():
        return f"norm{tie}"
    return f"weight of {type(owner).__name__}{tie}"
