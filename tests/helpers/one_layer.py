"""One linear layer, experts for it, and tokens."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from models import random_factors, write_adapter
from spectr import ExpertLibrary

INPUTS, OUTPUTS, EXPERTS, TOKENS = 24, 16, 5, 12


EQUAL = dict.fromkeys("abcde", 4)


UNEQUAL = {"a": 1, "b": 4, "c": 16, "d": 2, "e": 20}  # e has more than there are outputs


def plain_layer(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(OrderedDict(layer=nn.Linear(INPUTS, OUTPUTS))).to(dtype)


def one_layer_library(root, ranks, alpha=6.0):
    for seed, (name, rank) in enumerate(ranks.items()):
        write_adapter(root / name, {"layer": random_factors(rank, INPUTS, OUTPUTS, seed)}, alpha=alpha)
    return ExpertLibrary.open(root)


def some_tokens(dtype=torch.float32, size=1.0):
    return (size * torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(11))).to(dtype)
