"""Which of a model's parameters are weights of linear layers, by transformers; needs no memory for weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from spectr.composition.find_weight_reads import find_weight_reads
from spectr.errors import MissingExtraError, ModelError, first_line
from spectr.layers.linear_layers import features


class Linear(NamedTuple):
    """A linear layer whose weight can be adapted; ``transposed`` if it is stored as (inputs, outputs)."""

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
    """The model that a configuration describes.

    Attributes:
        model: On the meta device.
        linear: Linear layers by the name of their weight.
        kinds: Types of the other parameters, by name: "embedding", "norm", "bias", ...
        tied: Parameters that are the same as another one, with that one's name.
        modules: Names of all modules.
        uncalled: Those of the linear layers whose weights the model uses without calling them, by their names.
    """

    model: Any
    linear: Mapping[str, Linear]
    kinds: Mapping[str, str]
    tied: Mapping[str, str]
    modules: tuple[str, ...]
    uncalled: frozenset[str] = frozenset()

    @property
    def model_class(self) -> str:
        """The name of the model's class."""
        return type(self.model).__name__

    def in_head(self, parameter: str) -> bool:
        """Whether a parameter belongs to the class's head, which the headless model lacks."""
        prefix = self.model.base_model_prefix
        return hasattr(self.model, prefix) and not parameter.startswith(f"{prefix}.")


def read_architecture(folder: Path, *, called_only: bool = False) -> Architecture:
    """The architecture of a language model, built on the ``meta`` device.

    Args:
        folder: Of the model.
        called_only: Whether to take layers whose weights the model uses without calling them for no linear layers.

    Raises:
        ModelError: transformers cannot build a language model from the folder's ``config.json``.
        MissingExtraError: transformers is not installed.
    """
    model = _on_meta(folder)
    names: dict[int, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {name: first for name, p in parameters.items() if (first := names.setdefault(id(p), name)) != name}
    outside = find_weight_reads(model).outside
    skipped = {*tied, *tied.values(), *(f"{name}.weight" for name in outside if called_only)}
    linear = {
        f"{name}.weight": found
        for name, module in model.named_modules()
        if (found := _linear(name, module)) and f"{name}.weight" not in skipped
    }
    owners = dict(model.named_modules())
    kinds = {name: _kind(name, owners[name.rpartition(".")[0]], tied) for name in parameters if name not in linear}
    used = {f"{name}.weight" for name in outside} - linear.keys()
    kinds |= dict.fromkeys(used, "weight that is used without its layer")
    return Architecture(
        model=model,
        linear=linear,
        kinds=kinds,
        tied=tied,
        modules=tuple(name for name in owners if name),
        uncalled=frozenset(layer.module for layer in linear.values() if layer.module in outside),
    )


def _on_meta(folder: Path) -> Any:
    """A causal language model, else one with an encoder, else one with pictures: as users load them."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
    except ImportError as error:
        raise MissingExtraError("extracting experts", "models") from error
    problems: list[Exception] = []
    for kind in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText):
        try:
            config = AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                return kind.from_config(config)
        except Exception as error:  # damaged configurations raise anything
            problems.append(error)
    raise ModelError(
        f"transformers cannot build a language model from {folder / 'config.json'}: {first_line(problems[0])}",
        expected="a model that AutoModelForCausalLM, -Seq2SeqLM or -ImageTextToText can build, without custom code",
        do="check the folder, or update transformers",
    ) from problems[0]


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
