"""A library of four small experts for a tiny Llama, and what the tests of composing compare."""

from __future__ import annotations

import re

import pytest
import torch

from models import (
    identities,
    logits,
    random_factors,
    tiny_llama,
    tokens,
    types_unchecked,
    write_adapter,
)
from spectr import Arrow, Oracle, RoutedLinear, Spectr, Uniform, compose

RANKS = {"ants": 4, "bees": 4, "cats": 4, "dogs": 4}
UNEQUAL = {"ants": 2, "bees": 4, "cats": 8, "dogs": 3}
Q, V, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"
ROUTERS = [Spectr(top_k=2), Spectr(top_k=2, weights="softmax"), Arrow(top_k=2), Uniform(), Oracle(expert="cats")]
ROUTERS += [Spectr(top_k=2, score="projection", combine="factors")]
ids = tokens(batch=3, length=8)


def folders(root, *names):
    return {name: root / "equal" / name for name in names}


def weights(model):
    """Every layer's weights, by layer and expert, of the batch ``ids``; and the logits."""
    seen, handles = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedLinear):
            handles.append(layer.register_forward_pre_hook(lambda m, x, name=name: seen.update({name: (m, x[0])})))
    out = logits(model, ids)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        table = {
            name: dict(zip(layer.experts, layer.route(x).weights_TE.unbind(-1), strict=True))
            for name, (layer, x) in seen.items()
        }
    return table, out


def same(one, other):
    (table, out), (other_table, other_out) = one, other
    assert {n: set(w) for n, w in table.items()} == {n: set(w) for n, w in other_table.items()}
    for name, by_expert in table.items():
        for expert, weight in by_expert.items():
            assert torch.equal(weight, other_table[name][expert]), (name, expert)
    assert torch.equal(out, other_out)


def composed(library, router):
    model = tiny_llama()
    return model, compose(model, library, router)


def unharmed(model, act, error, match):
    before, out = identities(model), logits(model, ids)
    with types_unchecked(), pytest.raises(error) as caught:
        act()
    assert re.search(match, str(caught.value)), str(caught.value)
    assert identities(model) == before
    assert torch.equal(logits(model, ids), out)
    return caught.value


def module_adapter(folder, shapes, rank=4, **config):
    """A hand-written adapter for modules given as ``{name: (inputs, outputs)}``."""
    factors = {
        name: random_factors(rank, inputs, outputs, seed)
        for seed, (name, (inputs, outputs)) in enumerate(shapes.items())
    }
    return write_adapter(folder, factors, **config)
