"""The cache with room: transformers' keys and values, in memory that is written on."""

import copy

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from models import TEXT, TOKENS, build, tiny_llama, tokens
from spectr.models import growing_cache
from spectr.models.cache import GrowingLayer

CHANGES = ("more", "many", "crop", "all gone", "reorder", "repeat", "select", "copy")


def change(layer, kind, new):
    if kind in ("more", "many"):
        layer.update(*new[kind])
    elif kind in ("crop", "all gone"):
        layer.crop(-(layer.get_seq_length() // 2 if kind == "crop" else layer.get_seq_length()))
    elif kind == "reorder":
        layer.reorder_cache(torch.arange(layer.keys.shape[0]).flip(0))
    elif kind == "repeat":
        layer.batch_repeat_interleave(2)
    elif kind == "select":
        layer.batch_select_indices(torch.arange(layer.keys.shape[0])[:2])
    else:
        layer = copy.deepcopy(layer)
    return layer


@given(kinds=st.lists(st.sampled_from(CHANGES), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_keys_and_values_are_those_of_transformers_own_layer(kinds, seed):
    ours, own = GrowingLayer(), DynamicLayer()
    chance = torch.Generator().manual_seed(seed)
    for kind in ("many", *kinds):
        rows = ours.keys.shape[0] if ours.is_initialized else 2
        if rows > 16 and kind == "repeat":
            continue
        new = {
            name: [torch.randn(rows, 3, length, size, generator=chance) for size in (4, 5)]
            for name, length in (("more", 1), ("many", 70))
        }
        ours, own = change(ours, kind, new), change(own, kind, new)
        assert ours.get_seq_length() == own.get_seq_length()
        torch.testing.assert_close((ours.keys, ours.values), (own.keys, own.values), rtol=0, atol=0)


def test_a_tokens_keys_are_written_behind_those_before_until_there_is_no_room():
    layer, one = GrowingLayer(), torch.ones(1, 2, 1, 4)
    places = [layer.update(one * n, one * n)[0].data_ptr() for n in range(100)]
    assert len(set(places)) == 2  # 65 tokens, then more
    assert layer.keys[0, 0, :, 0].tolist() == list(range(100))


def test_what_was_cropped_does_not_come_back_in_a_copy():
    layer, one = GrowingLayer(), torch.ones(1, 2, 3, 4)
    layer.update(one, one)
    before = copy.deepcopy(layer)
    layer.crop(-2)
    layer.update(5 * one, 5 * one)
    assert before.keys.unique().tolist() == [1]
    assert layer.keys[0, 0, :, 0].tolist() == [1, 5, 5, 5]


def test_a_cache_of_inference_mode_goes_on_outside_of_it():
    layer, one = GrowingLayer(), torch.ones(1, 2, 3, 4)
    with torch.inference_mode():
        layer.update(one, one)
    keys, _ = layer.update(2 * one, 2 * one)
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert not keys.is_inference()


def test_gradients_flow_as_through_transformers_own():
    layer, one = GrowingLayer(), torch.ones(1, 2, 3, 4)
    learnt = one.clone().requires_grad_()
    layer.update(one, one)
    keys, _ = layer.update(learnt, learnt)
    (keys * keys).sum().backward()
    torch.testing.assert_close(learnt.grad, 2 * one)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_model_answers_as_with_transformers_own(more):
    model, ids = tiny_llama(), tokens(2, 9)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "min_new_tokens": 40, **more}
    answers = []
    for cache in (None, growing_cache(model)):
        torch.manual_seed(3)
        answers.append(model.generate(ids, past_key_values=cache, **given))
    assert torch.equal(*answers)
    assert all(type(layer) is GrowingLayer for layer in cache.layers)


def test_a_layer_that_keeps_a_window_alone_stays_as_it_is():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 8}
    model = build(Gemma3ForCausalLM, Gemma3TextConfig(**{**TEXT, **TOKENS, "num_key_value_heads": 2, **kinds}))
    cache = growing_cache(model)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, GrowingLayer]
    ids = tokens(2, 12)
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(ids, past_key_values=cache, **told), model.generate(ids, **told))


def test_a_model_with_a_kind_of_its_own_keeps_it():
    from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    model = tiny_llama()
    assert isinstance(growing_cache(model), DynamicCache)
    model.generation_config.cache_implementation = "static"
    assert growing_cache(model) is None
    mamba = MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=2)
    t5 = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1)
    assert growing_cache(MambaForCausalLM(mamba)) is None
    assert growing_cache(T5ForConditionalGeneration(t5)) is None
