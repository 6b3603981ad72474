"""What is read again when a decision changes, and who inherits the decision of another."""

from __future__ import annotations

import copy
from contextvars import copy_context

import pytest
import torch
import transformers
from recurrent import FAMILIES
from sequences import FREE, SEVEN, World, pair, prompts_of, say
from transformers import DynamicCache, StaticCache
from transformers.generation import BaseStreamer

import spectr
from models import build, close
from spectr.errors import CompositionError


@pytest.mark.parametrize("how", ["hold", "allow"])
def test_a_recurrent_state_is_read_again_whatever_its_name(tmp_path, how):
    cls, config, settings, targets = FAMILIES["Mamba"]
    world = World(build(getattr(transformers, cls), getattr(transformers, config)(**settings)), tmp_path, targets)
    model, routed = world.routed()
    (a, _), (b, two) = prompts_of(routed)
    out = model(a, use_cache=True)
    if how == "hold":
        routed.prompt.hold(routed.prompt.decide(input_ids=b))
    else:
        routed.allow([two])
    got = model(SEVEN, cache_params=out.cache_params, use_cache=True).logits[0, -1]
    close(got, world.oracle(two)(torch.cat([a, SEVEN], 1)).logits[0, -1], 1e-4)


def test_a_decoders_tokens_are_not_read_as_the_models(tmp_path):
    model, routed = pair("Bart", tmp_path).routed()
    (a, _), (b, _) = prompts_of(routed)
    out = model(input_ids=a, decoder_input_ids=torch.tensor([[0, 5, 6]]), use_cache=True)
    encoded, length = (out.encoder_last_hidden_state,), out.past_key_values.get_seq_length()
    routed.prompt.hold(routed.prompt.decide(input_ids=b))
    with pytest.raises(CompositionError, match="pass the whole prompt again"):
        model(encoder_outputs=encoded, decoder_input_ids=SEVEN, past_key_values=out.past_key_values, use_cache=True)
    assert out.past_key_values.get_seq_length() == length


def test_a_held_decision_of_one_row_serves_a_batch_that_continues(world, shared):
    model, routed, ((a, _), (b, two)) = shared
    ids, new = torch.cat([a, a]), torch.tensor([[7, 8], [9, 10]])
    cache, whole = DynamicCache(config=model.config), torch.cat([ids, new], 1)
    model(ids, past_key_values=cache)
    routed.prompt.hold(routed.prompt.decide(input_ids=b))
    try:
        got = say(model, new, attention_mask=torch.ones_like(whole), past_key_values=cache)
    finally:
        routed.prompt.hold(None)
    assert torch.equal(got, say(world.oracle(two), whole))


def test_a_generation_inside_a_block_of_another_composition_decides_itself(world, shared):
    _, other, _ = shared
    model, routed = world.routed()
    (a, one), (b, two) = prompts_of(routed)
    with other.prompt.using(other.prompt.decide(input_ids=a)):
        for ids, expert in ((a, one), (b, two)):
            assert torch.equal(say(model, ids), say(world.oracle(expert), ids))


def test_a_context_that_outlives_a_generation_does_not_keep_its_decision(world, shared):
    model, _, ((a, _), (b, two)) = shared
    kept = []

    class Keep(BaseStreamer):
        def put(self, value):
            kept.append(copy_context())

        def end(self):
            pass

    model.generate(a, streamer=Keep(), **FREE)
    assert torch.equal(kept[-1].run(say, model, b), say(world.oracle(two), b))


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_what_was_encoded_keeps_its_decision(tmp_path, name):
    world = pair(name, tmp_path)
    model, routed = world.routed()
    (a, one), (b, _) = prompts_of(routed)
    begin, other = torch.tensor([[0, 7, 9]]), routed.prompt.decide(input_ids=b)
    encoded = model.get_encoder()(input_ids=a)
    want = world.oracle(one)(input_ids=a, decoder_input_ids=begin).logits
    calls = {
        "model": lambda: model(encoder_outputs=encoded, decoder_input_ids=begin),
        "decoder": lambda: model.get_decoder()(input_ids=begin, encoder_hidden_states=encoded[0]),
        "generate": lambda: model.generate(encoder_outputs=copy.copy(encoded), **FREE),
        "beams": lambda: model.generate(encoder_outputs=copy.copy(encoded), num_beams=2, **FREE),
    }
    routed.prompt.hold(other)
    for call in calls.values():
        with pytest.raises(CompositionError, match="another decision"):
            call()
    with routed.prompt.using(other), pytest.raises(CompositionError, match="another decision"):
        calls["model"]()
    routed.prompt.hold(routed.prompt.decide(input_ids=a))
    close(calls["model"]().logits, want, 1e-4)
    calls["generate"]()
    routed.prompt.hold(None)
    close(calls["model"]().logits, want, 1e-4)  # what used it left its record as it was


def test_a_decoder_does_not_decide_what_an_encoder_used(tmp_path):
    model, routed = pair("T5", tmp_path).routed()
    (a, _), (b, _) = prompts_of(routed)
    begin, encoded = torch.tensor([[0, 7, 9]]), (model.get_encoder()(input_ids=a)[0].clone(),)  # of unknown origin
    for ids in (b, a):
        with routed.prompt.using(routed.prompt.decide(input_ids=ids)):
            model(encoder_outputs=encoded, decoder_input_ids=begin)
    with pytest.raises(CompositionError, match="no decision for these encoder outputs"):
        model(encoder_outputs=encoded, decoder_input_ids=begin)


def test_a_token_router_does_not_decode_what_forbidden_experts_encoded(tmp_path):
    model, routed = pair("T5", tmp_path).routed(spectr.Spectr(top_k=1))
    ids, begin = torch.arange(5, 11)[None], torch.tensor([[0, 7, 9]])
    encoded = model.get_encoder()(input_ids=ids)
    model(encoder_outputs=encoded, decoder_input_ids=begin)
    routed.allow(["ants"])
    with pytest.raises(CompositionError, match="no decision for these encoder outputs"):
        model(encoder_outputs=encoded, decoder_input_ids=begin)
    model(encoder_outputs=(encoded[0].clone(),), decoder_input_ids=begin)  # of unknown origin


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_static_cache_that_a_generation_filled_is_read_again_without_its_padding(world, implementation):
    """Transformers gives such a generation's calls masks of four axes, which show no padding."""
    model, routed = world.routed()
    model.set_attn_implementation(implementation)
    (a, _), (b, two) = prompts_of(routed)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), a], 1)
    mask = (padded > 0).long()
    cache = StaticCache(config=model.config, max_cache_len=40)
    said = model.generate(padded, attention_mask=mask, past_key_values=cache, **FREE)
    mask = torch.cat([mask, torch.ones_like(said[:, padded.shape[1] :])], 1)
    routed.prompt.hold(routed.prompt.decide(input_ids=b))
    place = (mask.sum() - 1).view(1, 1)
    got = model(said[:, -1:], attention_mask=mask, position_ids=place, past_key_values=cache).logits[0, -1]
    close(got, world.oracle(two)(said[:, 3:]).logits[0, -1], 1e-4)


def test_a_mask_that_has_room_for_more_shows_padding_where_it_is(world):
    model, routed = world.routed()
    (a, _), (b, two) = prompts_of(routed)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), a, SEVEN], 1)
    cache = StaticCache(config=model.config, max_cache_len=40)
    mask = torch.zeros(1, 40, dtype=torch.long)
    mask[:, 3:9] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    model(padded[:, :9], attention_mask=mask, position_ids=places[:, :9], past_key_values=cache)
    routed.prompt.hold(routed.prompt.decide(input_ids=b))
    mask[:, 9] = 1
    got = model(SEVEN, attention_mask=mask, position_ids=torch.tensor([[6]]), past_key_values=cache).logits[0, -1]
    close(got, world.oracle(two)(padded[:, 3:]).logits[0, -1], 1e-4)


def test_what_a_mask_of_four_axes_hid_is_not_read_again(world):
    model, routed = world.routed()
    (a, _), (b, _) = prompts_of(routed)
    cache = DynamicCache(config=model.config)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 3:, 1] = False
    model(a, attention_mask=mask, past_key_values=cache)
    routed.prompt.hold(routed.prompt.decide(input_ids=b))
    with pytest.raises(CompositionError, match="more than token ids"):
        model(SEVEN, past_key_values=cache)
    assert cache.get_seq_length() == 6
