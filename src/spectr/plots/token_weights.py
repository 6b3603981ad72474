"""What the pictures show: each expert's weight for each token and layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spectr.errors import DataError, did_you_mean
from spectr.grouping import grouped
from spectr.layers import Trace
from spectr.library import ExpertLibrary

ALL_LAYERS = "all layers"
_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRouting:
    """Routing of one text.

    Attributes:
        title: What the text is.
        tokens: The tokens as text.
        experts: Names, in alphabetical order.
        layers: Names of the layer groups; the first is all of them.
        weights: Mean weights, (layers, tokens, experts), float32, from 0 to 1.
    """

    title: str
    tokens: tuple[str, ...]
    experts: tuple[str, ...]
    layers: tuple[str, ...]
    weights: Float[Tensor, "L T E"]

    @property
    def shares(self) -> dict[str, float]:
        """Each expert's share of the work over all tokens and layers, from 0 to 1."""
        return dict(zip(self.experts, self.weights[0].mean(0).tolist(), strict=True))

    @property
    def leaders(self) -> tuple[tuple[str, float], ...]:
        """The experts with their shares, largest first."""
        return tuple(sorted(self.shares.items(), key=lambda item: -item[1]))


def layer_groups(modules: Iterable[str]) -> dict[str, list[str]]:
    """Modules grouped as "layer N"; the first group, "all layers", holds all of them."""
    names = list(modules)
    blocks = ((_BLOCK.search(f".{name}."), name) for name in names)
    return {ALL_LAYERS: names, **grouped((f"layer {block[1]}", name) for block, name in blocks if block)}


def layer_named(layer: str, library: ExpertLibrary) -> str:
    """The name of a layer group, which may be given as a number.

    Raises:
        DataError: The library's experts have no such layer.
    """
    known = layer_groups(module for expert in library for module in library[expert].shapes)
    name = f"layer {layer}" if layer.isdigit() else layer
    if name not in known:
        raise DataError(f"unknown layer '{layer}'", do=did_you_mean(name, known))
    return name


def token_routing(
    trace: Trace, tokenizer: PreTrainedTokenizerBase, *, title: str = "", batch: int = 0, skip: int = 0
) -> TokenRouting:
    """The routing of one text of a traced batch, without padding.

    Args:
        trace: A closed trace of a model that was given ``input_ids``.
        tokenizer: Turns ids back into text.
        title: What the text is.
        batch: The text's number in the batch.
        skip: Number of tokens to leave out at the beginning, such as a system message.
    """
    real_T = trace.mask[batch].clone()
    real_T[real_T.nonzero()[:skip]] = False
    groups = layer_groups(trace)
    members = {group: frozenset(names) for group, names in groups.items()}
    weights = torch.stack([trace.weights(names.__contains__)[batch][real_T] for names in members.values()])
    ids = trace.input_ids[batch][real_T].tolist()
    return TokenRouting(
        title=title,
        tokens=tuple(str(tokenizer.decode([token])) for token in ids),
        experts=trace.experts,
        layers=tuple(groups),
        weights=weights,
    )
