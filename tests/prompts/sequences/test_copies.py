"""Copies of a composed model, models that others wrap, and compiled ones."""

from __future__ import annotations

import copy
import pickle

import torch
from sequences import World, prompts_of, say

import spectr
from models import close, tiny_llama


def test_copies_of_the_model(world, shared):
    (a, one), (_, two) = shared[2]
    model, routed = world.routed(spectr.Calibrated())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for ids, name in shared[2]:
            assert torch.equal(say(copied, ids), say(world.oracle(name), ids))
    copied, handle = copy.deepcopy((model, routed))
    handle.allow([two])
    assert torch.equal(say(copied, a), say(world.oracle(two), a))
    assert torch.equal(say(model, a), say(world.oracle(one), a))


def test_others_wrap_the_model_too(world, shared):
    """Accelerate's hooks, put on before or after; they are there after a change and after ``remove``."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    (a, one), (_, two) = shared[2]
    for first in (True, False):
        model = copy.deepcopy(world.base)
        if first:
            add_hook_to_module(model, ModelHook())
        routed = spectr.compose(model, world.library, spectr.Calibrated())
        if not first:
            add_hook_to_module(model, ModelHook())
        hooked = model._old_forward
        for names, expert in ((None, one), ([two], two), (None, one)):
            routed.allow(names)
            assert torch.equal(say(model, a), say(world.oracle(expert), a))
        routed.remove()
        assert model._old_forward is hooked
        remove_hook_from_module(model)
        assert torch.equal(say(model, a), say(world.base, a))


def test_a_compiled_model(world, tmp_path):
    """Decisions are made outside of the graphs."""
    small = World(tiny_llama(num_hidden_layers=1), tmp_path, ["q_proj", "down_proj"])
    model, routed = small.routed()
    compiled = torch.compile(model, backend="eager")
    for ids, name in prompts_of(routed):
        close(compiled(ids, use_cache=False).logits, small.oracle(name)(ids).logits)
        assert torch.equal(say(compiled, ids), say(small.oracle(name), ids))
